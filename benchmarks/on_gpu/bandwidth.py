"""Process: what the device is, and how fast it copies."""

from __future__ import annotations

from typing import Any

from generation.subprocesses import Json, serve
from max.driver import Device, DeviceSpec, load_devices

from .floor import copy_bytes_per_s


def describe(device: Device, size: int) -> dict[str, Any]:
    """The device's name, its memory and the speed of a copy of `size` bytes."""
    return {
        "api": device.api,
        "architecture": device.architecture_name,
        "stats": {name: str(value) for name, value in device.stats.items()},
        "copy_bytes_per_s": copy_bytes_per_s(device, size),
    }


def _serve(request: Json) -> tuple[Json, None]:
    (device,) = load_devices([DeviceSpec(id=0, device_type="gpu")])
    return describe(device, request["size"]), None


if __name__ == "__main__":
    serve(_serve)
