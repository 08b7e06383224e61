"""Which grammar the generated text must follow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from unispec.commands.options import TextFile, option_group

if TYPE_CHECKING:
    from unispec.sampling.grammar import Grammar

__all__ = ["ConstraintOptions", "constraint_options"]


class SchemaFile(TextFile):
    """A file with a JSON schema."""

    def parse(self, text: str) -> str:
        """Returns the text if it is a JSON object."""
        try:
            schema = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})"
            ) from error
        except RecursionError as error:
            raise ValueError("is nested too deep for a JSON schema") from error
        if not isinstance(schema, dict):
            raise ValueError("is no JSON schema; a schema is a JSON object")
        return text


@dataclass(frozen=True, kw_only=True)
class ConstraintOptions:
    """The grammar as the user gives it."""

    json_schema: str | None
    regex: str | None

    def __post_init__(self) -> None:
        """Raises `click.UsageError` for both grammars at once, or an empty one."""
        if self.json_schema is not None and self.regex is not None:
            raise click.UsageError("--json-schema and --regex exclude each other; give one")
        if self.regex == "":
            raise click.UsageError("--regex is empty; give a pattern")

    def grammar(self) -> Grammar | None:
        """Returns the grammar, or None if anything may be generated.

        Raises:
            InputError: the grammar cannot be compiled.
        """
        text = self.json_schema or self.regex
        if text is None:
            return None
        from unispec.sampling.grammar import Grammar

        return Grammar(kind="json_schema" if self.json_schema else "regex", text=text)


constraint_options = option_group(
    "constraint",
    ConstraintOptions,
    click.option(
        "--json-schema", type=SchemaFile(), help="Generate JSON that satisfies this schema."
    ),
    click.option("--regex", metavar="PATTERN", help="Generate text that matches this pattern."),
)
"""Adds `--json-schema` and `--regex` to a command, as `ConstraintOptions`."""
