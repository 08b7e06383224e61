"""The documentation as text: every public name is documented, every page and link is there."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
DOCS = ROOT / "docs"
CONTRACT = json.loads((ROOT / "tests" / "data" / "api_contract.json").read_text())["modules"]
# Every page of the navigation, in its order.
NAVIGATION = re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        path.read_text(encoding="utf-8")
    )
    for path in sorted(SOURCE.rglob("*.py"))
}
CLASSES = {
    node.name: node
    for tree in MODULES.values()
    for node in tree.body
    if isinstance(node, ast.ClassDef)
}
IMPLEMENTED = [module for module in CONTRACT if f"pipelines.{module}" in MODULES]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def exported(tree: ast.Module) -> set[str]:
    """The names of a module's `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def assignments(body: list[ast.stmt]) -> Iterator[tuple[str, bool]]:
    """Each assigned name of a module or class, and whether a text stands below it."""
    for node, after in zip(body, [*body[1:], None], strict=True):
        documented = (
            isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        )
        if isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target), documented
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                yield ast.unparse(target), documented


def bases(cls: ast.ClassDef) -> Iterator[ast.ClassDef]:
    """The classes of this package that a class is derived from."""
    for base in cls.bases:
        name = ast.unparse(base).partition("[")[0]
        if name in CLASSES:
            yield CLASSES[name]
            yield from bases(CLASSES[name])


def is_layer(base: ast.expr) -> bool:
    """Whether this is the base of layers, of either API of MAX or of torch."""
    return ast.unparse(base).partition("[")[0] in ("Module", "nn.Module")


def fields(cls: ast.ClassDef) -> set[str]:
    """Public attributes: those of the class and, but for layers, those that `__init__` sets."""
    names = {name for name, _ in assignments(cls.body)}
    family = (cls, *bases(cls))
    if not any(is_layer(base) for member in family for base in member.bases):
        made = [m for m in cls.body if isinstance(m, Function) and m.name == "__init__"]
        names |= {
            node.attr
            for function in made
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) == "self"
        }
    return {name for name in names if not name.startswith("_")}


def documented_fields(cls: ast.ClassDef) -> set[str]:
    """Attributes with a text of their own, in the class's docstring, or in a base's.

    One that has the name of a parameter is that parameter.
    """
    known = set()
    for member in (cls, *bases(cls)):
        known |= {name for name, documented in assignments(member.body) if documented}
        listed = (ast.get_docstring(member) or "").partition("Attributes:")[2]
        known |= set(re.findall(r"^    (\w+): ", listed, re.MULTILINE))
        known |= described_parameters(member)
    return known


def described_parameters(node: ast.ClassDef | Function) -> set[str]:
    """The names in the `Args:` of a docstring."""
    section = (ast.get_docstring(node) or "").partition("\nArgs:\n")[2]
    inside = re.split(r"^\S", section, maxsplit=1, flags=re.MULTILINE)[0]
    return set(re.findall(r"^    \**(\w+): ", inside, re.MULTILINE))


def made_up_parameters(
    path: str, owner: ast.ClassDef | Function, function: Function
) -> Iterator[str]:
    """Parameters that a docstring describes and that are not there.

    Others may be left out: their name and type say it all.
    """
    taken = function.args
    every = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs, taken.vararg, taken.kwarg]
    names = {one.arg for one in every if one} - {"self", "cls"}
    yield from (f"{path}: no parameter {name}" for name in described_parameters(owner) - names)


def raises(function: Function) -> set[str]:
    """The exceptions that the body raises by name."""
    calls = (node.exc for node in ast.walk(function) if isinstance(node, ast.Raise))
    return {ast.unparse(call.func) for call in calls if isinstance(call, ast.Call)}


def is_setter(function: Function) -> bool:
    """Whether it sets a property."""
    return any(
        isinstance(decorator, ast.Attribute) and decorator.attr == "setter"
        for decorator in function.decorator_list
    )


def is_overload(function: Function) -> bool:
    """Whether it states one more type of the function that follows, which documents all."""
    return any(ast.unparse(decorator) == "overload" for decorator in function.decorator_list)


def undocumented(path: str, node: ast.stmt) -> Iterator[str]:
    """What is missing in the documentation of a public class or function.

    Fields of the command line's dataclasses are its options, documented by `--help`.
    """
    if isinstance(node, ast.ClassDef):
        if ast.get_docstring(node) is None:
            yield path
        if not path.startswith("commands."):
            missing = fields(node) - documented_fields(node)
            yield from (f"{path}.{name}" for name in sorted(missing))
        for member in node.body:
            if isinstance(member, Function) and member.name == "__init__":
                yield from made_up_parameters(path, node, member)
            if not isinstance(member, Function) or is_setter(member):
                continue  # the property's getter documents both
            if re.match("[a-z]|__call__", member.name):
                yield from undocumented(f"{path}.{member.name}", member)
    elif isinstance(node, Function) and not is_overload(node):
        text = ast.get_docstring(node) or ""
        if not text:
            yield path
        yield from made_up_parameters(path, node, node)
        for error in raises(node) & {"InputError", "ValueError"}:
            if f"{error}:" not in text.partition("Raises:")[2]:
                yield f"{path}: raises {error}"


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_documented(module: str) -> None:
    tree = MODULES[module]
    public = exported(tree)
    missing = [] if ast.get_docstring(tree) else [module]
    missing += [
        f"{module}.{name}"
        for name, documented in assignments(tree.body)
        if name in public and not documented
    ]
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function) and node.name in public:
            missing += undocumented(f"{module}.{node.name}", node)
    assert missing == []


NAMED = ("Args", "Attributes", "Raises")
"""Sections of a docstring whose entries begin with a name and a colon."""


def sections(text: str) -> Iterator[tuple[str, str]]:
    """What stands in a docstring's sections: the name of the section, and each entry of it."""
    parts = re.split(r"^(Args|Attributes|Raises|Returns|Yields):\n", text, flags=re.MULTILINE)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        inside = re.split(r"^\S", body, maxsplit=1, flags=re.MULTILINE)[0].rstrip()
        between = r"^    (?=\S)" if name in NAMED else r"\Z"
        for entry in filter(None, re.split(between, inside, flags=re.MULTILINE)):
            yield name, " ".join(entry.split())


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_have_one_form(module: str) -> None:
    """An entry goes on after its colon in lower case, and ends with a full stop."""
    wrong = []
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ClassDef | Function):
            for section, entry in sections(ast.get_docstring(node) or ""):
                text = entry.partition(": ")[2] if section in NAMED else entry
                # A word; `K`, `GGUF` and names of products keep their capitals.
                begins_wrong = section in NAMED and re.match(
                    r"(A|[A-Z][a-z]+)\b(?<!Kimi)(?<!Hugging)", text
                )
                if begins_wrong or not text.endswith("."):
                    wrong.append(f"{node.name}: {entry}")
    assert wrong == []


def test_every_option_of_the_command_line_has_a_help_text() -> None:
    calls = [node for tree in MODULES.values() for node in ast.walk(tree)]
    options = [
        call
        for call in calls
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("click.option", "setting")
    ]
    assert len(options) > 20
    without = [
        ast.unparse(call)
        for call in options
        if "help" not in {keyword.arg for keyword in call.keywords}
    ]
    assert without == []


def test_documented_modules_have_their_pages_in_the_order_of_the_contract() -> None:
    """The site's pages are made from `__all__`, so a name that is in it is on the page."""
    expected = [f"api/pipelines.{module}.md" for module in IMPLEMENTED]
    assert [page for page in NAVIGATION if page in expected] == expected
    for module in IMPLEMENTED:
        assert set(CONTRACT[module]["objects"]) <= exported(MODULES[f"pipelines.{module}"]), module


@pytest.mark.parametrize("module", IMPLEMENTED)
def test_documented_methods_are_on_the_page(module: str) -> None:
    """Own or inherited from a class of this package: the site shows no others."""
    for name, documented in CONTRACT[module]["objects"].items():
        family = (CLASSES[name], *bases(CLASSES[name]))
        members = {m.name for cls in family for m in cls.body if isinstance(m, Function)}
        assert set(documented["methods"]) <= members, name


def test_navigation_names_every_page_and_only_pages_that_can_be_built() -> None:
    assert len(NAVIGATION) == len(set(NAVIGATION))
    made = {page for page in NAVIGATION if page.startswith("api/")}
    modules = {Path(page).stem for page in made}
    assert modules <= set(MODULES)
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert set(NAVIGATION) - made == written


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS.glob("*.md")], ids=lambda p: p.name)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    pages = {(DOCS / name).resolve() for name in NAVIGATION}
    dead = []
    for address in re.findall(r"\]\(([^)\s]+)", text):
        parts = urlsplit(address)
        target = page.parent / unquote(parts.path)
        if parts.path and not parts.scheme and not (target.exists() or target.resolve() in pages):
            dead.append(address)
    assert dead == []
