"""Compiled graphs in a folder: code for one model, one version of unispec and one kind of device.

MAX's file of compiled code says nothing of what it was made from, and takes weights of any size. So
a manifest beside it says that, and what differs is refused.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

from max.driver import Device
from max.engine import CompiledModel, read
from pydantic import BaseModel

from unispec.errors import InputError

from . import processor

__all__ = [
    "CompiledGraph",
    "Identity",
    "check_compiled",
    "facts_of",
    "read_compiled",
    "write_compiled",
]

MANIFEST: Final = "manifest.json"
CODE: Final = "step.mef"
_FORMAT: Final = 1
_PACKAGES: Final = ("unispec", "max", "mojo-compiler")
# What a graph is made by.
_SOURCES: Final = ("pipelines", "sampling", "kernels", "kv_cache")
_CHUNK: Final = 1 << 20
_AGAIN: Final = "run unispec compile again"
_SAME: Final = f"give the options that it was compiled with, or {_AGAIN}"


@dataclass(frozen=True)
class Identity:
    """What compiled code depends on."""

    versions: Mapping[str, str]
    """Of the packages."""
    sources: str
    """SHA-256 of the source files that graphs are made by."""
    processor: Mapping[str, Any]
    """`machine`, and the `features` of the processor, for a graph has code for the host, too."""
    device: str
    """`cpu`, or a GPU's interface and architecture."""
    facts: Mapping[str, str]
    """See `facts_of`."""
    weights: Mapping[str, str]
    """Number format and shape of each weight, by its name."""

    @classmethod
    def of(cls, facts: Mapping[str, str], weights: Mapping[str, Any], device: Device) -> Identity:
        """The identity of a graph that is or would be built now."""
        return cls(
            versions=_versions(),
            sources=_sources(),
            processor=_processor(),
            device="cpu" if device.is_host else f"{device.api}:{device.architecture_name}",
            facts=facts,
            weights={name: _kind(weights[name]) for name in sorted(weights)},
        )

    def difference(self, made: Identity) -> str | None:
        """Why code that was made for the other identity cannot run as this one; None if it can."""
        if made.device != self.device:
            return f"for {made.device}, this is {self.device}: {_AGAIN} with its --target"
        for what, now, then in (
            ("", self.facts, made.facts),
            ("weight ", self.weights, made.weights),
        ):
            # In the order in which they stand, the graph's name first.
            for name in dict.fromkeys([*now, *then]):
                if now.get(name) != then.get(name):
                    before, here = then.get(name, "nothing"), now.get(name, "nothing")
                    return f"with {what}{name} {before}, here it is {here}: {_SAME}"
        return None


class CompiledGraph(NamedTuple):
    """What a folder has."""

    code: CompiledModel
    """To be initialised with the weights."""
    digest: str
    """SHA-256 of the graph's text, in hexadecimal."""


def facts_of(name: str, inputs: Sequence[Any], config: Any) -> dict[str, str]:
    """What a graph is built from, each fact as text by its name.

    Args:
        name: the graph's.
        inputs: types of its inputs, in order.
        config: dataclass; each value in it is a fact, by its path.
    """
    types = {f"input {index}": str(kind) for index, kind in enumerate(inputs)}
    return {"graph": name, **dict(_leaves(config, "")), **types}


def write_compiled(folder: Path, code: CompiledModel, digest: str, identity: Identity) -> None:
    """Writes compiled code and its manifest.

    Args:
        folder: an empty one.
        digest: SHA-256 of the graph's text, in hexadecimal.

    Raises:
        InputError: it cannot be written.
    """
    try:
        code.export_mef(folder / CODE)
    except RuntimeError as error:
        raise InputError(f"{CODE} cannot be written ({error}); make room") from error
    manifest = {
        "format": _FORMAT,
        "code": _checksum(folder / CODE),
        "graph": digest,
        "identity": asdict(identity),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def check_compiled(folder: Path) -> None:
    """Checks all of a folder that takes neither weights nor a device.

    Raises:
        InputError: it has no compiled graph, or one of another version or processor.
    """
    _read_manifest(folder)


def read_compiled(folder: Path, identity: Identity) -> CompiledGraph:
    """The compiled code of a folder.

    Args:
        identity: what it has to be compiled for.

    Raises:
        InputError: the folder has none, it is damaged, or it was compiled for something else.
    """
    manifest = _read_manifest(folder)
    if reason := identity.difference(Identity(**manifest["identity"])):
        raise InputError(f"{folder} was compiled {reason}")
    path = folder / CODE
    try:
        if _checksum(path) == manifest["code"]:
            return CompiledGraph(read(path), manifest["graph"])
    except (OSError, RuntimeError):
        pass
    raise InputError(f"{path} is missing or damaged: copy the folder again, or {_AGAIN}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    """A manifest of this version of the packages, and for this processor."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder} has no {MANIFEST}: give a folder that unispec compile has written"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): change that") from error
    try:
        manifest = json.loads(text)
        valid = manifest["format"] == _FORMAT and _is_identity(manifest["identity"])
        valid = valid and all(isinstance(manifest[name], str) for name in ("code", "graph"))
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise InputError(f"{path} is damaged, or of another version of unispec: {_AGAIN}")
    identity = manifest["identity"]
    reason = (
        _other_versions(identity["versions"])
        or _other_sources(identity["sources"])
        or _other_processor(identity["processor"])
    )
    if reason:
        raise InputError(f"{folder} was compiled {reason}: {_AGAIN}")
    return dict(manifest)


def _is_identity(found: Any) -> bool:
    """Whether JSON has the types of an `Identity`."""
    Identity(**found)
    mappings = ("versions", "facts", "weights")
    return (
        all(isinstance(found[name], str) for name in ("sources", "device"))
        and all(_has_texts(found[name].values()) for name in mappings)
        and isinstance(found["processor"]["machine"], str)
        and _has_texts(found["processor"]["features"])
    )


def _has_texts(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _other_versions(then: Mapping[str, str]) -> str | None:
    for name, here in _versions().items():
        if then.get(name) != here:
            return f"by {name} {then.get(name)}, this is {here}"
    return None


def _other_sources(then: str) -> str | None:
    if then == _sources():
        return None
    return f"by other source files of unispec {version('unispec')}"


def _other_processor(then: Mapping[str, Any]) -> str | None:
    here = _processor()
    if then["machine"] != here["machine"]:
        return f"for {then['machine']}, this is {here['machine']}"
    missing = sorted({*then["features"]} - {*here["features"]})
    if missing:
        return f"for a processor with {', '.join(missing)}, which this one lacks"
    return None


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


def _processor() -> dict[str, Any]:
    # Where the system does not tell, code runs on a processor of the same name only.
    return {
        "machine": platform.machine(),
        "features": processor.features() or [processor.name()],
    }


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Each value of a configuration, by its path."""
    if is_dataclass(value):
        inner = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, BaseModel):
        inner = {name: getattr(value, name) for name in type(value).model_fields}
    elif isinstance(value, Mapping):
        inner = {str(name): value[name] for name in value}
    else:
        yield path, repr(value)
        return
    yield path or "configuration", type(value).__name__
    for name, part in inner.items():
        yield from _leaves(part, f"{path}.{name}".lstrip("."))


def _kind(weight: Any) -> str:
    """Number format and shape."""
    dtype = getattr(weight.dtype, "name", str(weight.dtype))
    return f"{dtype} {[int(size) for size in weight.shape]}"


def _checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


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
