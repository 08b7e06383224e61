"""The number format of a stack: what is requested, or what its device is best at."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from max.driver import DeviceSpec
from max.pipelines.modeling.config_enums import SupportedEncoding, supported_encoding_supported_on

from unispec.encodings import BFLOAT16, FLOAT32
from unispec.errors import InputError

__all__ = ["choose_encoding"]


def choose_encoding(
    requested: SupportedEncoding | None,
    devices: Sequence[DeviceSpec],
    supported: Collection[SupportedEncoding],
) -> SupportedEncoding:
    """The requested encoding; by default float32 on a CPU and bfloat16 on GPUs.

    Args:
        supported: what the stack can compute in.

    Raises:
        InputError: an encoding that the stack or a device does not support.
    """
    if requested is None:
        return FLOAT32 if all(spec.device_type == "cpu" for spec in devices) else BFLOAT16
    if requested not in supported:
        here = [
            name
            for name in supported
            if all(supported_encoding_supported_on(name, spec) for spec in devices)
        ]
        known = " or ".join(map(repr, sorted(here, reverse=True)))
        raise InputError(f"quantization encoding {requested!r} is not supported; use {known}")
    for spec in devices:
        if not supported_encoding_supported_on(requested, spec):
            raise InputError(
                f"quantization encoding {requested!r} does not run on {spec.device_type!r}; use"
                " 'float32' or a GPU"
            )
    return requested
