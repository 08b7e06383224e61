"""The fields of an EAGLE-3 draft's config.json that a Llama's does not have, in three dialects.

The authors' files (SafeAILab/EAGLE) have none of them. SpecForge, SGLang and NVIDIA keep most in
`eagle_config`. The `speculators` library (vllm-project/speculators) has them at the top level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from typing_extensions import Self

from unispec.checkpoints.tapped_layers import default_layer_ids
from unispec.errors import InputError

__all__ = ["Eagle3Fields"]

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
    outputs = _find(config, _OUTPUT_IDS)
    ids = _find(config, _IDS) if outputs is None else outputs
    name = _IDS if outputs is None else _OUTPUT_IDS
    if ids is None:
        return default_layer_ids(num_layers)
    is_integers = isinstance(ids, list | tuple) and all(type(one) is int for one in ids)
    if not is_integers or not ids:
        raise InputError(f"{name} {ids!r} of {source} is no list of layers; correct config.json")
    is_outputs = outputs is not None or (not _is_speculators(config) and min(ids) == 1)
    found = [one if is_outputs else one - 1 for one in ids]
    for stated, layer in zip(ids, found, strict=True):
        if not 0 <= layer < num_layers:
            raise InputError(
                f"{name} of {source} has {stated}, but the target has layers 0 to"
                f" {num_layers - 1} and the draft reads the output of {layer}; use a draft that"
                " was trained for this target"
            )
    return found


def _is_speculators(config: Any) -> bool:
    return getattr(config, _SPECULATORS, None) is not None


def _find(config: Any, name: str) -> Any:
    """The value in `eagle_config`, else at the top level; None if it is in neither."""
    nested = getattr(config, "eagle_config", None)
    found = nested.get(name) if isinstance(nested, Mapping) else None
    return getattr(config, name, None) if found is None else found
