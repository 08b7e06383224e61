"""Compiled graphs in a folder: code for one model, one version of unispec and one kind of device.

MAX's file of compiled code says nothing of what it was made from, and takes weights of any size. So
a manifest beside it says that, and what differs is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

from max.driver import Device
from max.engine import CompiledModel, read

from unispec.errors import InputError

from .processor import features

__all__ = ["CompiledGraph", "Identity", "read_compiled", "write_compiled"]

MANIFEST: Final = "manifest.json"
CODE: Final = "step.mef"
_FORMAT: Final = 1
_PACKAGES: Final = ("unispec", "max", "mojo-compiler")
# What a graph is made by.
_SOURCES: Final = ("pipelines", "sampling", "kernels", "kv_cache")
_KIND: Final = "configuration"
_AGAIN: Final = "run unispec compile again"


@dataclass(frozen=True)
class Identity:
    """What compiled code depends on."""

    versions: Mapping[str, str]
    """Of the packages."""
    sources: str
    """SHA-256 of the source files that graphs are made by."""
    device: Mapping[str, Any]
    """`api`, and the GPU's `architecture` or the processor's `features` that code may use."""
    config: Mapping[str, str]
    """Each value of the graph's configuration, by its path."""
    weights: Mapping[str, str]
    """Number format and shape of each weight, by its name."""

    @classmethod
    def of(cls, config: Any, weights: Mapping[str, Any], device: Device) -> Identity:
        """The identity of a graph that is or would be built now."""
        return cls(
            versions={name: version(name) for name in _PACKAGES},
            sources=_sources(),
            device=_device(device),
            config=dict(_leaves(config, "")),
            weights={name: _kind(weights[name]) for name in sorted(weights)},
        )

    def difference(self, other: Identity) -> str | None:
        """Why code of the other identity cannot run as this one; None where it can."""
        for name, here in self.versions.items():
            if (then := other.versions.get(name)) != here:
                return f"by {name} {then}, this is {here}: {_AGAIN}"
        if reason := self._other_device(other.device):
            return reason
        options = f"give the options that it was compiled with, or {_AGAIN}"
        for what, now, before in (
            ("", self.config, other.config),
            ("weight ", self.weights, other.weights),
        ):
            # The kind of configuration first: another one has other values.
            for name in sorted({*now, *before}, key=lambda name: (name != _KIND, name)):
                if now.get(name) != before.get(name):
                    then, here = before.get(name, "nothing"), now.get(name, "nothing")
                    return f"with {what}{name} {then}, here it is {here}: {options}"
        if self.sources != other.sources:
            return f"by other source files of unispec {self.versions['unispec']}: {_AGAIN}"
        return None

    def _other_device(self, device: Mapping[str, Any]) -> str | None:
        now, before = (
            " ".join(str(each[key]) for key in ("api", "architecture") if key in each)
            for each in (self.device, device)
        )
        if now != before:
            return f"for {before}, this is {now}: {_AGAIN} with its --target"
        missing = sorted({*device.get("features", ())} - {*self.device.get("features", ())})
        if missing:
            return f"for a processor with {', '.join(missing)}, which this one lacks: {_AGAIN} here"
        return None


class CompiledGraph(NamedTuple):
    """What a folder has."""

    code: CompiledModel
    digest: str
    """SHA-256 of the graph's text, in hexadecimal."""


def write_compiled(folder: Path, code: CompiledModel, digest: str, identity: Identity) -> None:
    """Writes compiled code and its manifest, which comes last.

    Args:
        folder: a new or empty one.
        digest: SHA-256 of the graph's text, in hexadecimal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    code.export_mef(folder / CODE)
    manifest = {
        "format": _FORMAT,
        "code": _checksum(folder / CODE),
        "graph": digest,
        "identity": {field.name: getattr(identity, field.name) for field in fields(identity)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def read_compiled(folder: Path, identity: Identity) -> CompiledGraph:
    """The compiled code of a folder.

    Args:
        identity: what it has to be compiled for.

    Raises:
        InputError: the folder has none, it is damaged, or it was compiled for something else.
    """
    manifest = _read_manifest(folder)
    made = Identity(**manifest["identity"])
    if reason := identity.difference(made):
        raise InputError(f"{folder} was compiled {reason}")
    path = folder / CODE
    if not path.is_file() or _checksum(path) != manifest["code"]:
        raise InputError(f"{path} is missing or damaged: copy the folder again, or {_AGAIN}")
    return CompiledGraph(read(path), manifest["graph"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] == _FORMAT:
            Identity(**manifest["identity"])
            return dict(manifest)
    except FileNotFoundError:
        raise InputError(
            f"{folder} has no {MANIFEST}: give a folder that unispec compile has written"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path} cannot be read by this version of unispec: {_AGAIN}")


def _device(device: Device) -> dict[str, Any]:
    if device.is_host:
        return {"api": "cpu", "features": features()}
    return {"api": device.api, "architecture": device.architecture_name}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Each value of a configuration of dataclasses, by its path."""
    if not is_dataclass(value):
        yield path, repr(value)
        return
    yield path or _KIND, type(value).__name__
    for field in fields(value):
        yield from _leaves(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))


def _kind(weight: Any) -> str:
    """Number format and shape."""
    dtype = getattr(weight.dtype, "name", str(weight.dtype))
    return f"{dtype} {[int(size) for size in weight.shape]}"


def _checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _sources() -> str:
    """SHA-256 of the sources of graphs, in hexadecimal."""
    package, digest = Path(__file__).parents[2], hashlib.sha256()
    for folder in _SOURCES:
        for source in sorted((package / folder).rglob("*")):
            if source.suffix in (".py", ".mojo"):
                digest.update(f"{source.relative_to(package)}\0".encode())
                digest.update(hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()
