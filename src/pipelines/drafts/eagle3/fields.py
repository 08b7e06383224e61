"""The fields of an EAGLE-3 draft's config.json that a Llama's does not have, in three dialects.

The authors' files (SafeAILab/EAGLE) have none of them. SpecForge, SGLang and NVIDIA keep most in
`eagle_config`. The `speculators` library (vllm-project/speculators) has them at the top level.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from typing_extensions import Self

from unispec.checkpoints.tapped_layers import default_layer_ids
from unispec.errors import InputError

__all__ = ["Eagle3Fields"]

_LOGGER: Final = logging.getLogger(__name__)
_IDS: Final = "eagle_aux_hidden_state_layer_ids"
_OUTPUT_IDS: Final = "aux_hidden_states_layer_ids"
_SPECULATORS: Final = "speculators_model_type"

# What changes the forward pass and has no code here, and the values that change nothing.
_ONLY: Final[Mapping[str, tuple[Any, ...]]] = {
    "use_aux_hidden_state": (None, True),
    "use_input_layernorm_in_first_layer": (None, True),
    "use_last_layernorm": (None, True),
    "eh_proj_before_attn": (None, False),
    "parallel_draft_step": (None, 0, 1),
    # Of DFlash and DeepSpec, whose ids are not these.
    "target_layer_ids": (None,),
}


class Eagle3Fields(NamedTuple):
    """What an EAGLE-3 draft's config has beside its layers."""

    target_layer_ids: list[int]
    """Target layers, from 0, whose outputs the draft reads, in this order."""
    norm_before_residual: bool
    """Whether the first layer adds to the normed feature."""
    norm_before_fc: bool
    """Whether one norm stands before `fc`, over all tapped outputs at once."""
    fc_norm: bool
    """Whether each tapped output has a norm before `fc` (EAGLE-3.1)."""
    norm_output: bool
    """Whether the final norm is part of what the next row reads (EAGLE-3.1)."""

    @classmethod
    def from_huggingface(cls, config: Any, *, num_layers: int, source: str) -> Self:
        """Reads the fields, in `eagle_config` or at the top level.

        Args:
            config: the draft's Hugging Face config.
            num_layers: the target's.

        Raises:
            InputError: a field of the wrong kind, one with a value that is not supported, or a
                layer that the target does not have.
        """
        nested = getattr(config, "eagle_config", None)
        if nested is not None and not isinstance(nested, Mapping):
            raise InputError(
                f"eagle_config {nested!r:.100} of {source} is no object; correct its config.json"
            )
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise InputError(
                f"layer_types of {source} has 'sliding_attention', which is not supported in an"
                " EAGLE-3 draft; use a draft of full layers"
            )
        for name, harmless in _ONLY.items():
            if _find(config, name) not in harmless:
                raise InputError(
                    f"{name} {_find(config, name)!r} of {source} is not supported; use a draft"
                    " without this key"
                )

        def flag(name: str, default: bool = False) -> bool:
            value = _find(config, name)
            value = default if value is None else value
            if not isinstance(value, bool):
                raise InputError(
                    f"{name} {value!r} of {source} is no boolean; correct its config.json"
                )
            return value

        fields = cls(
            target_layer_ids=_layer_ids(config, num_layers, source),
            # vLLM's reading of a speculators file that does not say.
            norm_before_residual=flag("norm_before_residual", _is_speculators(config)),
            norm_before_fc=flag("norm_before_fc"),
            fc_norm=flag("fc_norm"),
            norm_output=flag("norm_output"),
        )
        if fields.norm_before_fc and fields.fc_norm:
            raise InputError(
                f"norm_before_fc and fc_norm of {source} are both set; use a draft with one of them"
            )
        return fields


def _layer_ids(config: Any, num_layers: int, source: str) -> list[int]:
    """Layers whose outputs are read.

    An id k of the `speculators` library is the state before layer k, so the output of the one
    before. AngelSlim's own key has outputs. In `eagle_config` SpecForge and NVIDIA had outputs, of
    which layer 1 is always the first, and have states before layers since; SGLang tells them apart
    the same way (pull request 25454).
    """
    before, outputs = _integers(config, _IDS, source), _integers(config, _OUTPUT_IDS, source)
    if outputs is not None:
        if before not in (None, outputs, [k + 1 for k in outputs]):
            raise InputError(
                f"{_OUTPUT_IDS} {outputs} and {_IDS} {before} of {source} name other layers; remove"
                " the wrong one"
            )
        return _checked(_OUTPUT_IDS, outputs, outputs, num_layers, source)
    if before is None:
        return default_layer_ids(num_layers)
    if not _is_speculators(config) and before[0] == 1:
        return _checked(_IDS, before, before, num_layers, source)
    found = _checked(_IDS, before, [k - 1 for k in before], num_layers, source)
    if not (_is_speculators(config) or num_layers in before or before[0] == 2):
        _LOGGER.warning(
            "%s: %s %s is read as states before these layers; if outputs are meant, state them as"
            " %s",
            source,
            _IDS,
            before,
            _OUTPUT_IDS,
        )
    return found


def _integers(config: Any, name: str, source: str) -> list[int] | None:
    """A list of layers; None where there is none."""
    ids = _find(config, name)
    if ids is None:
        return None
    if not isinstance(ids, list | tuple) or not ids or any(type(one) is not int for one in ids):
        raise InputError(
            f"{name} {ids!r:.100} of {source} is no list of layers; correct its config.json"
        )
    return list(ids)


def _checked(
    name: str, stated: list[int], outputs: list[int], num_layers: int, source: str
) -> list[int]:
    """The layers whose outputs are meant, all of them the target's."""
    for one, layer in zip(stated, outputs, strict=True):
        if layer < 0:
            raise InputError(
                f"{name} of {source} has {one}, and what is before the first layer cannot be read;"
                " use a draft that reads layers only"
            )
        if layer >= num_layers:
            raise InputError(
                f"{name} of {source} has {one}, but the target has {num_layers} layers; use a draft"
                " that was trained for this target"
            )
    return outputs


def _is_speculators(config: Any) -> bool:
    return getattr(config, _SPECULATORS, None) is not None


def _find(config: Any, name: str) -> Any:
    """The value in `eagle_config`, else at the top level; None if it is in neither."""
    nested = getattr(config, "eagle_config", None)
    found = nested.get(name) if isinstance(nested, Mapping) else None
    return getattr(config, name, None) if found is None else found
