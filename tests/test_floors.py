"""The rooms of the package stand on floors: what a module imports lies in its room or below."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "src"

FLOORS = (
    ("errors", "allocator", "telemetry", "waiting"),
    ("new_folder",),
    ("batch_schedule", "encodings", "methods"),
    ("checkpoints", "images", "chat"),
    ("sampling", "kv_cache", "kernels"),
    ("pipelines.lookup", "pipelines.policy"),
    ("pipelines.speculative",),
    ("pipelines.runtime",),
    ("pipelines.layers",),
    ("pipelines.unified",),
    ("pipelines.targets", "pipelines.served"),
    ("pipelines.drafts",),
    ("pipelines.architectures",),
    ("engine",),
    ("training", "serving"),
    ("commands",),
    ("cli",),
    ("deployment",),
)
"""From the ground up. Rooms of one floor do not import each other."""

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str | None:
    """The room of a dotted path below `unispec`; the two packages around rooms have none."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in FLOOR_OF), None)


def imported(file: Path) -> set[str]:
    """Whatever a file imports of the package, in a function or for types only, too."""
    package, found = ("unispec", *file.relative_to(ROOT).parent.parts), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{name.name}" for name in node.names}
    return {name.removeprefix("unispec.") for name in found if name.startswith("unispec.")}


def test_imports_run_down() -> None:
    wrong = []
    for file in sorted(ROOT.rglob("*.py")):
        path = file.relative_to(ROOT).with_suffix("")
        own = room_of(".".join(path.parts))
        if path.name == "__init__" and own is None:
            continue
        assert own, f"{path} is in no room: add it to a floor"
        for name in sorted(imported(file)):
            room = room_of(name)
            if room != own and (room is None or FLOOR_OF[room] >= FLOOR_OF[own]):
                wrong.append(f"{path} imports {name}")
    assert not wrong, "\n".join(wrong)
