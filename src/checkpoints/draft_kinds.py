"""What kind of draft a checkpoint is, told by its config.json and the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from unispec.errors import InputError
from unispec.methods import FACTS, Method, generations

__all__ = [
    "DraftKind",
    "check_draft_files",
    "check_draft_kind",
    "draft_kind",
    "method_of_draft",
    "tensor_shapes",
]

_OTHER: Final = "use an EAGLE or DFlash draft that was trained for this target"


class DraftKind(Enum):
    """A kind of draft; the values are what it is called and what to do with one."""

    EAGLE = "an EAGLE draft", "give --speculative-method eagle"
    """EAGLE-1 or EAGLE-2, which share their weights."""
    DFLASH = "a DFlash draft", "give --speculative-method dflash"
    """z-lab's first DFlash."""
    EAGLE_NORMS = "an EAGLE draft with norms of its own (HASS), which is not supported", _OTHER
    """As EAGLE, but with norms of the embedding, the feature and before the head."""
    EAGLE3 = "an EAGLE-3 draft", "give --speculative-method eagle3"
    """One layer over the embedding and three of the target's states."""
    PARALLEL_EAGLE = "a P-EAGLE draft, which is not supported", _OTHER
    """EAGLE-3 that proposes all tokens at once."""
    DFLASH2 = "a DFlash2 draft, which is not supported", _OTHER
    """DFlash with convolutions and a selector of candidates."""
    DSPARK = "a DSpark draft, which is not supported", _OTHER
    """DFlash with a head that corrects one proposal by the one before."""
    MEDUSA = "a set of Medusa heads, which is not supported", _OTHER
    """A head for each of the next tokens, without attention."""
    MTP = (
        "an MTP layer",
        "give --speculative-method mtp with the target's whole checkpoint, and no draft model",
    )
    """A layer that was trained with its target and belongs to its checkpoint."""
    MODEL = (
        "a whole language model, which is not supported as a draft",
        _OTHER + ", or make one with `unispec train`",
    )
    """A model that needs no target."""

    def __str__(self) -> str:
        return self.value[0]


_SPECULATORS: Final = {
    "dflash": DraftKind.DFLASH,
    "dflash2": DraftKind.DFLASH2,
    "dspark": DraftKind.DSPARK,
    "eagle": DraftKind.EAGLE,
    "eagle3": DraftKind.EAGLE3,
    "medusa": DraftKind.MEDUSA,
    "mtp": DraftKind.MTP,
    "peagle": DraftKind.PARALLEL_EAGLE,
}
# In the order in which they are tried: a name may hold a later one too.
_ARCHITECTURES: Final = {
    "peagle": DraftKind.PARALLEL_EAGLE,
    "eagle3": DraftKind.EAGLE3,
    "eagle": DraftKind.EAGLE,
    "dspark": DraftKind.DSPARK,
    "dflash2": DraftKind.DFLASH2,
    "dflash": DraftKind.DFLASH,
    "medusa": DraftKind.MEDUSA,
    "mtp": DraftKind.MTP,
    "nextn": DraftKind.MTP,
}
_KEYS: Final = {
    "eagle_config": DraftKind.EAGLE3,
    "eagle_aux_hidden_state_layer_ids": DraftKind.EAGLE3,
    "medusa_num_heads": DraftKind.MEDUSA,
    "selector_rank": DraftKind.DFLASH2,
    "dflash_config": DraftKind.DFLASH,
    "target_layer_ids": DraftKind.DFLASH,
}
# Kinds that only the configuration tells from the one that the tensors show.
_VARIANTS: Final = {
    DraftKind.DFLASH: (DraftKind.DFLASH2, DraftKind.DSPARK),
    DraftKind.EAGLE3: (DraftKind.PARALLEL_EAGLE,),
}
# Names without `model.`; the first that is found in any name decides.
_TENSORS: Final = {
    r"midlayer\.": DraftKind.EAGLE3,
    r"layers\.0\.hidden_norm\.": DraftKind.EAGLE3,
    r"(medusa_head\.)?\d+\.\d+\.(linear\.)?weight$": DraftKind.MEDUSA,
    r".*\beh_proj\.": DraftKind.MTP,
    r".*\b(candidate_selector|attention_conv|mlp_conv)\.": DraftKind.DFLASH2,
    r"markov_head\.": DraftKind.DSPARK,
    r"(embed|embedding|hidden|lm_head|pre_lm_head)_layernorm\.": DraftKind.EAGLE_NORMS,
    r"hidden_norm\.": DraftKind.DFLASH,
    r"fusion_fc\.": DraftKind.EAGLE,
}

# By how many states `fc` joins to one.
_PROJECTIONS: Final = {2: DraftKind.EAGLE, 3: DraftKind.EAGLE3}


def draft_kind(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> DraftKind | None:
    """The kind of a draft; None where nothing tells.

    Args:
        config: config.json as it stands in the file.
        shapes: of the checkpoint's tensors by name, which outweigh the configuration; None:
            the weights are not at hand.
    """
    stated = _kind_of_config(config)
    found = None if shapes is None else _kind_of_tensors(shapes)
    return stated if found is None or stated in _VARIANTS.get(found, ()) else found


def check_draft_kind(
    method: Method,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    source: str,
) -> None:
    """Refuses a draft of another kind than the method's and its later generations'.

    Raises:
        InputError: the draft is of a kind that this method does not run.
    """
    kind = draft_kind(config, shapes)
    if kind is None or kind in _kinds(method):
        return
    what, advice = kind.value
    raise InputError(f"{source} is {what}; {advice}")


def method_of_draft(
    method: Method,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Method:
    """The generation of a draft that a method was asked for; itself where nothing tells.

    Args:
        config: config.json as it stands in the file.
        shapes: of the checkpoint's tensors by name; None: the weights are not at hand.
    """
    kind = draft_kind(config, shapes)
    return method if kind is None else _kinds(method).get(kind, method)


def check_draft_files(method: Method, paths: Sequence[Path], *, source: str) -> None:
    """Refuses weight files of another kind than the method's; no weight is read.

    Args:
        paths: the files; those that are no safetensors, or damaged, say nothing here.

    Raises:
        InputError: the draft is of a kind that this method does not run.
    """
    check_draft_kind(method, {}, tensor_shapes(paths), source=source)


def tensor_shapes(paths: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in weight files, by name; no weight is read.

    Args:
        paths: the files; those that are no safetensors, or damaged, have none here.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                names = file.keys()
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (OSError, SafetensorError):
            continue
    return shapes


def _kinds(method: Method) -> dict[DraftKind, Method]:
    """The kinds of drafts that a method is asked for, each with its generation."""
    drafts = {name: FACTS[name].draft for name in generations(method)}
    return {DraftKind[draft.kind]: name for name, draft in drafts.items() if draft is not None}


def _kind_of_config(config: Mapping[str, Any]) -> DraftKind | None:
    stated = config.get("speculators_model_type")
    if isinstance(stated, str) and stated in _SPECULATORS:
        norms = stated == "eagle" and config.get("layernorms") is True
        return DraftKind.EAGLE_NORMS if norms else _SPECULATORS[stated]
    names = config.get("architectures")
    declared = [config.get("model_type"), *(names if isinstance(names, list) else ())]
    for part, kind in _ARCHITECTURES.items():
        if any(isinstance(name, str) and part in name.lower() for name in declared):
            return kind
    nested = config.get("dflash_config")
    keys = {*config, *(nested if isinstance(nested, Mapping) else ())}
    return next((kind for key, kind in _KEYS.items() if key in keys), None)


def _kind_of_tensors(shapes: Mapping[str, tuple[int, ...]]) -> DraftKind | None:
    names = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    for pattern, kind in _TENSORS.items():
        if any(re.match(pattern, name) for name in names):
            return kind
    projection = names.get("fc.weight")
    if projection is None:
        whole = any(name.startswith("layers.") for name in names) and "norm.weight" in names
        return DraftKind.MODEL if whole else None
    if len(projection) != 2 or projection[0] == 0:
        return None
    rows, columns = projection
    return next((kind for n, kind in _PROJECTIONS.items() if columns == n * rows), None)
