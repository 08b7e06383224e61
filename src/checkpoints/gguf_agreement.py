"""A GGUF file held against the config.json that lies beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from unispec.checkpoints.gguf import read_gguf
from unispec.errors import InputError

__all__ = ["check_agreement"]

# What no shape of a tensor shows, by the names of config.json.
_HIDDEN: Final = ("rms_norm_eps", "num_attention_heads", "num_key_value_heads", "head_dim")
# The file has float32, and the divisors of its table of frequencies are rounded as well.
_TOLERANCE: Final = 1e-4


def check_agreement(path: Path, config: Any, *, source: str) -> None:
    """Refuses a config.json that computes otherwise than the file says.

    Args:
        config: of Hugging Face, made of config.json.

    Raises:
        InputError: the rotary embedding, the epsilon or the heads differ, or see `read_gguf`.
    """
    described = read_gguf(path).config
    rope = getattr(config, "rope_parameters", None) or {}
    pairs = [(name, described[name], getattr(config, name, None)) for name in _HIDDEN]
    ours = described["rope_parameters"]
    kinds = ours["rope_type"], rope.get("rope_type", "default")
    pairs += [("rope_theta", ours["rope_theta"], _theta(config, rope)), ("rope_type", *kinds)]
    if kinds[0] == kinds[1]:
        scaling = [name for name in ours if name not in ("rope_theta", "rope_type")]
        pairs += [(name, ours[name], rope.get(name)) for name in scaling]
    for name, in_file, in_config in pairs:
        if in_config is not None and not _equal(in_file, in_config):
            raise InputError(
                f"{path} has {name} {_shown(in_file)} and config.json of {source} has"
                f" {_shown(in_config)}: use the config.json that belongs to the file, or give the"
                " file alone as the model"
            )


def _theta(config: Any, rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_theta") or getattr(config, "rope_theta", None)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, str) or not isinstance(other, int | float):
        return bool(one == other)
    return math.isclose(one, other, rel_tol=_TOLERANCE)


def _shown(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else repr(value)
