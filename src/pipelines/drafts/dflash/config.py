"""The fields of a DFlash draft's config.json that a Llama's does not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from typing_extensions import Self

from unispec.errors import InputError
from unispec.pipelines.layers.fields import positive_integer

__all__ = ["DflashDraftHFConfig", "complete_draft_config", "layer_causality", "layer_windows"]

_FULL: Final = "full_attention"
_SLIDING: Final = "sliding_attention"
_BOTH_WAYS: Final = "sliding_window_non_causal"


@dataclass(frozen=True)
class DflashDraftHFConfig:
    """What a DFlash draft's config has beside its layers."""

    mask_token_id: int
    """What stands in the slots to fill."""
    target_layer_ids: list[int]
    """Target layers, from 0, whose outputs the draft reads, in this order."""
    block_size: int | None = None
    """Slots of a block; None where the checkpoint does not say."""
    num_target_layers: int | None = None
    """Layers of the target that it was trained for; None where the checkpoint does not say."""

    @classmethod
    def from_huggingface(cls, config: Any, *, source: str = "the draft") -> Self:
        """Reads the fields, in `dflash_config` or at the top level (z-lab/dflash).

        The `speculators` format (vllm-project/speculators) has `aux_hidden_state_layer_ids`
        instead of `target_layer_ids`: layers before which the state is read, so one more.

        Args:
            config: a Hugging Face config, or its dictionary.

        Raises:
            InputError: a field is missing or of the wrong kind.
        """
        aux_ids = _find(config, "aux_hidden_state_layer_ids")
        layer_ids = _find(config, "target_layer_ids")
        if layer_ids is None and aux_ids is not None:
            entering = _integers("aux_hidden_state_layer_ids", aux_ids, source)
            if 0 in entering:
                raise InputError(
                    f"aux_hidden_state_layer_ids {entering} of {source} has 0, the embedding, which"
                    " cannot be tapped; use a draft that reads layers only"
                )
            layer_ids = [k - 1 for k in entering]
        if layer_ids is None:
            raise _missing("target_layer_ids", source)
        mask_token_id = _find(config, "mask_token_id")
        if mask_token_id is None:
            raise _missing("mask_token_id", source)
        block_size = _find(config, "block_size")
        num_target_layers = _find(config, "num_target_layers")
        return cls(
            mask_token_id=_integer("mask_token_id", mask_token_id, source),
            target_layer_ids=_integers("target_layer_ids", layer_ids, source),
            block_size=None if block_size is None else _integer("block_size", block_size, source),
            num_target_layers=None
            if num_target_layers is None
            else _integer("num_target_layers", num_target_layers, source),
        )


def complete_draft_config(draft: Any, requested: int | None, *, source: str) -> None:
    """Writes the fields into `dflash_config`, the only place where MAX looks for them.

    Args:
        draft: the draft's Hugging Face config, changed in place.
        requested: K, if the user set it.

    Raises:
        InputError: a field is missing or of the wrong kind, no layer is tapped, or neither
            the checkpoint nor the user says how large a block is.
    """
    fields = DflashDraftHFConfig.from_huggingface(draft, source=source)
    if not fields.target_layer_ids:
        raise InputError(
            f"target_layer_ids of {source} is empty; name the target layers that the draft reads"
        )
    if fields.block_size is None and requested is None:
        raise InputError(
            f"config.json of {source} has no block_size; give --num-speculative-tokens, one less"
            " than the block size it was trained with"
        )
    found = {name: value for name, value in asdict(fields).items() if value is not None}
    draft.dflash_config = {**(_get(draft, "dflash_config") or {}), **found}


def layer_windows(config: Any, *, source: str) -> list[int | None]:
    """The window of each draft layer in tokens, None where it sees the whole context.

    Args:
        config: the draft's Hugging Face config; without `layer_types` no layer has a window.

    Raises:
        InputError: an unknown layer type, one for each layer is not given, or a window is
            missing.
    """
    types = _layer_types(config, source)
    for name, harmless in _UNSUPPORTED.items():
        if _find(config, name) not in harmless:
            raise InputError(
                f"{name} {_find(config, name)!r} of {source} is not supported; use a draft without"
                " this key"
            )
    if _SLIDING not in types:
        return [None] * len(types)
    window = _find(config, "sliding_window")
    if window is None:
        raise InputError(
            f"sliding_window of {source} is missing or switched off, though it has sliding layers;"
            " state sliding_window, and for Qwen 3 use_sliding_window, in its config.json"
        )
    width = positive_integer("sliding_window", window, source)
    return [width if kind == _SLIDING else None for kind in types]


def layer_causality(config: Any, *, source: str) -> list[bool]:
    """Whether each draft layer hides from a slot of the block the slots after it.

    The first of these keys that is there decides: `is_causal` and `causal` for all layers,
    `sliding_window_non_causal` for sliding ones. Without a key sliding layers are causal.

    Args:
        config: the draft's Hugging Face config; without `layer_types` no layer is sliding.

    Raises:
        InputError: a key is no boolean, an unknown layer type, or one for each layer is not
            given.
    """
    types = _layer_types(config, source)
    for name in ("is_causal", "causal"):
        causal = _find(config, name)
        if causal is not None:
            return [_boolean(name, causal, source)] * len(types)
    both_ways = _find(config, _BOTH_WAYS)
    causal = both_ways is None or not _boolean(_BOTH_WAYS, both_ways, source)
    return [causal and kind == _SLIDING for kind in types]


# Keys of some published drafts that change the forward pass, and the values that do not.
_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "use_swa": (None, False),
    "input_embedding_scale": (None, 1, 1.0),
    "output_multiplier": (None, 1, 1.0),
    "final_logit_softcapping": (None,),
    "projector_type": (None, "dflash"),
    "sample_from_anchor": (None, False),
    "shift_label": (None, False),
}


def _layer_types(config: Any, source: str) -> list[str]:
    count = int(_get(config, "num_hidden_layers"))
    types = _get(config, "layer_types") or [_FULL] * count
    if len(types) != count:
        raise InputError(
            f"layer_types of {source} has {len(types)} entries for {count} layers;"
            " correct its config.json"
        )
    unknown = set(types) - {_FULL, _SLIDING}
    if unknown:
        raise InputError(
            f"layer type {sorted(unknown)[0]!r} of {source} is not supported; use a draft of"
            f" {_FULL!r} and {_SLIDING!r} layers"
        )
    return list(types)


def _get(config: Any, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    return getattr(config, name, None)


def _find(config: Any, name: str) -> Any:
    """The value in `dflash_config`, else at the top level; None if it is in neither."""
    nested = _get(config, "dflash_config")
    found = None if nested is None else _get(nested, name)
    return _get(config, name) if found is None else found


def _missing(name: str, source: str) -> InputError:
    return InputError(
        f"{name} is missing in config.json of {source}; add it to dflash_config, or give"
        " a DFlash draft"
    )


def _integer(name: str, value: Any, source: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} {value!r} of {source} is no integer; correct its config.json")
    return value


def _boolean(name: str, value: Any, source: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} {value!r} of {source} is no boolean; correct its config.json")
    return value


def _integers(name: str, values: Any, source: str) -> list[int]:
    if not isinstance(values, list | tuple):
        raise InputError(
            f"{name} {values!r} of {source} is no list of integers; correct its config.json"
        )
    return [_integer(name, value, source) for value in values]
