"""The number format of a stack: what is asked for, or what its device is best at."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from max.driver import DeviceSpec
from max.pipelines.modeling.config_enums import SupportedEncoding, supported_encoding_supported_on

from unispec.encodings import BFLOAT16, FLOAT32
from unispec.errors import InputError

__all__ = ["choose_encoding"]


def choose_encoding(
    asked: SupportedEncoding | None,
    devices: Sequence[DeviceSpec],
    supported: Collection[SupportedEncoding],
) -> SupportedEncoding:
    """The encoding asked for; by default float32 on a CPU and bfloat16 on GPUs.

    Args:
        asked: None: none is.
        supported: what it can compute in.

    Raises:
        InputError: an encoding that the stack or a device does not support.
    """
    if asked is None:
        return FLOAT32 if all(spec.device_type == "cpu" for spec in devices) else BFLOAT16
    if asked not in supported:
        known = " or ".join(map(repr, sorted(supported, reverse=True)))
        raise InputError(f"quantization encoding {asked!r} is not supported; use {known}")
    for spec in devices:
        if not supported_encoding_supported_on(asked, spec):
            raise InputError(
                f"quantization encoding {asked!r} does not run on {spec.device_type!r}; use"
                " 'float32' or a GPU"
            )
    return asked
