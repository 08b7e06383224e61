"""A checkpoint's tensors held against the names and shapes that a model expects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

import numpy as np

from unispec.checkpoints.quantisation import USE_PLAIN, check_names
from unispec.checkpoints.stored import StoredMatrix
from unispec.checkpoints.tensors import Weight
from unispec.errors import InputError

__all__ = ["canonical_names", "listed", "validated_state_dict"]

_PREFIX: Final = "model."
_LISTED_NAMES: Final = 5

_W = TypeVar("_W", bound=Weight)


def canonical_names(names: Iterable[str], *, source: str) -> dict[str, str]:
    """Maps each name without its `model.` prefix to the name in the checkpoint.

    Buffers of the rotary embedding are left out: they are computed.

    Args:
        names: the checkpoint's names.

    Raises:
        InputError: a tensor is there both with and without the prefix.
    """
    canonical: dict[str, str] = {}
    for name in names:
        if ".rotary_emb." in name:
            continue
        short = name.removeprefix(_PREFIX)
        if short in canonical:
            raise InputError(
                f"{source} has both {canonical[short]!r} and {name!r}: remove one of them"
            )
        canonical[short] = name
    return canonical


def validated_state_dict(
    tensors: Mapping[str, _W],
    names: Mapping[str, str],
    expected: Mapping[str, tuple[int, ...]],
    *,
    source: str,
    model: str,
    use_unquantised: str = USE_PLAIN,
) -> dict[str, _W]:
    """Takes the expected tensors from a checkpoint, each one once.

    Args:
        tensors: the checkpoint, under its own names; may be lazy.
        names: canonical names to the checkpoint's, see `canonical_names`.
        expected: canonical names to shapes.
        model: what the tensors should be ("a Llama"), for the errors.
        use_unquantised: what to use instead of quantised tensors, for the errors.

    Returns:
        The tensors under their canonical names, in the order of `expected`.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape, not of
            floating point (bytes are taken for float8 where they have scales), or has NaN or
            infinite values; of quantised blocks it is their scales.
    """
    unexpected = [original for name, original in names.items() if name not in expected]
    # Their matrices are missing under the names that are expected: this says more.
    check_names(unexpected, source, use=use_unquantised)
    if missing := [name for name in expected if name not in names]:
        raise InputError(
            f"{source} lacks {listed(missing)}, the first of shape"
            f" {list(expected[missing[0]])}: give all files of the checkpoint, with its own"
            " config.json"
        )
    if unexpected:
        raise InputError(
            f"{source} has {listed(unexpected)} that {model} of its config.json does not have:"
            " use a checkpoint of the supported format, with its own config.json"
        )
    state: dict[str, _W] = {}
    for name, shape in expected.items():
        tensor = tensors[names[name]]
        label = f"{source}: tensor {names[name]!r}"
        _check_tensor(
            tensor,
            shape,
            label=label,
            float8=name + "_scale" in expected,
            use_unquantised=use_unquantised,
        )
        state[name] = tensor
    return state


def listed(names: list[str]) -> str:
    """The first few of some tensor names, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:_LISTED_NAMES])
    more = len(names) - _LISTED_NAMES
    noun = "tensor" if len(names) == 1 else "tensors"
    return f"{noun} {shown}" + (f" and {more} more" if more > 0 else "")


def _check_tensor(
    tensor: Weight, shape: tuple[int, ...], *, label: str, float8: bool, use_unquantised: str
) -> None:
    if tensor.shape != shape:
        raise InputError(
            f"{label} has shape {list(tensor.shape)}, expected {list(shape)}: use the config.json"
            " that belongs to the checkpoint"
        )
    if isinstance(tensor, StoredMatrix):
        if bad := tensor.bad_numbers():
            scales = f"scales of its {tensor.kind.name} blocks"
            raise InputError(_not_finite(label, bad, scales if tensor.is_quantised else "values"))
        return
    if float8:
        if tensor.dtype != np.uint8:
            raise InputError(
                f"{label} has dtype {tensor.dtype} and scales, expected float8 e4m3: download or"
                " convert the checkpoint again"
            )
        if bad := int(((tensor & 0x7F) == 0x7F).sum()):
            raise InputError(_not_finite(label, bad))
        return
    if not np.issubdtype(tensor.dtype, np.floating):
        # What float8 is read as, and two numbers of 4 bits are stored as.
        form = ", which is float8 or packed" if tensor.dtype == np.uint8 else ""
        raise InputError(
            f"{label} has dtype {tensor.dtype}{form}, expected floating point: this quantised"
            f" format is not supported; {use_unquantised}"
        )
    # A NaN or infinity survives every sum, and a float64 sum of float32 cannot overflow.
    with np.errstate(invalid="ignore", over="ignore"):
        finite = np.isfinite(tensor.sum(dtype=np.float64))
    if not finite and (bad := int(tensor.size - np.isfinite(tensor).sum())):
        raise InputError(_not_finite(label, bad))


def _not_finite(label: str, count: int, what: str = "values") -> str:
    return (
        f"{label} has {count} NaN or infinite {what}, expected none: download or convert the"
        " checkpoint again"
    )
