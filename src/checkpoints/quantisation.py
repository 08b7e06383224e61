"""Quantised checkpoints that nothing here reads: which format it is, and what to use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from unispec.errors import InputError

__all__ = ["USE_PLAIN", "check_names", "check_plain", "stated_quantisation", "unsupported"]

USE_PLAIN: Final = "use the checkpoint that is not quantised, or a GGUF file"
"""What to do where no quantised safetensors are read."""

# Some converters write the second or the third.
_KEYS: Final = ("quantization_config", "compression_config", "quantization")
_DETAILS: Final = (
    "quant_method",
    "quant_algo",
    "quant_type",
    "format",
    "fmt",
    "weights",
    "bits",
    "w_bit",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "weight_block_size",
    "group_size",
)
"""Fields that tell formats apart, most telling ones first."""

_MARKS: Final = {
    ".weight_scale_2": "NVFP4 (modelopt)",
    ".weight_packed": "compressed-tensors, packed",
    ".g_idx": "GPTQ",
    ".qweight": "AWQ or GPTQ",
    ".absmax": "bitsandbytes, 4 bits",
    ".SCB": "bitsandbytes, 8 bits",
    ".W_q": "HQQ",
    ".biases": "MLX",
    ".weight_scale_inv": "float8 in blocks",
    ".weight_scale": "float8 or int8 with scales",
    ".input_scale": "float8 or int8 with scales",
    ".scales": "integers with scales",
}
"""How the tensors are called that only a quantised checkpoint has."""


def stated_quantisation(hf: Any) -> dict[str, Any]:
    """What a Hugging Face config says of its quantisation; empty if there is none."""
    for key in _KEYS:
        if stated := getattr(hf, key, None):
            return dict(stated if isinstance(stated, dict) else stated.to_dict())
    return {}


def check_plain(hf: Any, source: str, *, use: str = USE_PLAIN) -> None:
    """Refuses a config of a quantised checkpoint.

    Args:
        use: what to do, for the error.

    Raises:
        InputError: it states a quantisation, which the sentence names.
    """
    if stated := stated_quantisation(hf):
        raise unsupported(f"quantization_config of {source}", _described(stated), use=use)


def check_names(names: Iterable[str], source: str, *, use: str = USE_PLAIN) -> None:
    """Refuses tensors that only a quantised checkpoint has, whatever its config says.

    Args:
        names: of tensors that have no place in the model.

    Raises:
        InputError: one of them is of a quantised matrix; the sentence names the format.
    """
    found = list(names)
    for mark, form in _MARKS.items():
        for name in found:
            if name.endswith(mark):
                raise unsupported(f"tensor {name!r} of {source}", form, use=use)


def unsupported(where: str, form: str, *, use: str = USE_PLAIN) -> InputError:
    """The one sentence about every quantised format that is not read.

    Args:
        where: what says so, and of which file or folder.
        form: the format.
    """
    return InputError(f"{where} says {form}: this quantised format is not supported; {use}")


def _described(stated: dict[str, Any]) -> str:
    """The fields that tell the format, as config.json has them."""
    told = {name: stated[name] for name in _DETAILS if stated.get(name)}
    if not told:
        return f"only {', '.join(sorted(map(str, stated))) or 'nothing'}"
    return ", ".join(f"{name} {value!r}" for name, value in told.items())
