"""Hook of mkdocs: pages of the API and of the source, made and not written.

Every entry `api/MODULE.md` of the navigation becomes the docstrings of `unispec.MODULE`.
Every module becomes a page `source/...` with numbered lines, to which the API links.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = ROOT / "src"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages of the API and of the source."""
    for page in _pages(config.nav):
        if PurePosixPath(page).parent == PurePosixPath("api"):
            module = PurePosixPath(page).stem
            files.append(File.generated(config, page, content=_api(module)))
    for path in sorted(SOURCE.rglob("*.py")):
        name = PurePosixPath("unispec", *path.relative_to(SOURCE).parts)
        page = f"source/{name.with_suffix('.md')}"
        files.append(
            File.generated(
                config, page, content=_listing(path), inclusion=InclusionLevel.NOT_IN_NAV
            )
        )
    return files


def _pages(nav: Any) -> Iterator[str]:
    """The paths of a navigation, whatever its depth."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for entry in nav.values():
            yield from _pages(entry)
    else:
        for entry in nav or ():
            yield from _pages(entry)


def _api(module: str) -> str:
    """A page that shows what a package exports or, where it exports nothing, its modules."""
    package = SOURCE.joinpath(*module.split("."), "__init__.py")
    submodules = package.is_file() and "__all__" not in _assigned(package)
    return (
        f"---\ntitle: {module.rpartition('.')[2]}\n---\n\n"
        f"::: unispec.{module}\n    options:\n      show_submodules: {str(submodules).lower()}\n"
    )


def _assigned(path: Path) -> set[str]:
    """The names that a module assigns at its top level."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _listing(path: Path) -> str:
    """A source file as a page that the search leaves out."""
    name = path.relative_to(ROOT).as_posix()
    code = path.read_text(encoding="utf-8").rstrip()
    meta = f"title: {name}\nsearch:\n  exclude: true\nhide: [navigation, toc]\n"
    head = f"---\n{meta}---\n\n# {name}\n"
    return f'{head}\n~~~~ {{ .python linenums="1" }}\n{code}\n~~~~\n'
