"""Grammars that cannot be kept to are refused, and the message says why."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from grammar_states import allows

from unispec.errors import InputError
from unispec.sampling.grammar import Grammar, GrammarCompiler


@pytest.mark.parametrize(
    ("pattern", "cause"),
    [
        ("a(", "unclosed group"),
        ("[b-a]", "range"),
        ("(?=a)b", "look-around"),
        (r"(a)\1", "backreferences"),
        (r"a\bb", "lookarounds"),
        (r"[^\s\S]", "matches no text"),
        ("\ud800", "surrogates"),
        ("(a{1000}){1000}", "too many expressions"),
    ],
)
def test_regex_that_cannot_be_used(compiler: GrammarCompiler, pattern: str, cause: str) -> None:
    with pytest.raises(InputError) as caught:
        compiler.compile(Grammar("regex", pattern))
    message = str(caught.value)
    assert message.startswith(f"The regex {pattern!r} cannot be used: ")
    assert cause in message
    assert "Rust syntax" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "Expecting value"),
        ('{"type": ', "Expecting value"),
        ('{"minimum": NaN}', "NaN is no number of JSON"),
        ("[1, 2]", "not a JSON object"),
        ("true", "not a JSON object"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"items":' * 3000 + "{}" + "}" * 3000, "nested more than 64 deep"),
        ('{"items":' * 65 + "{}" + "}" * 65, "nested more than 64 deep"),
        ('{"type": "text"}', "Invalid type: text"),
        ('{"enum": []}', "Unsatisfiable"),
        ('{"minimum": 3, "maximum": 1, "type": "integer"}', "minimum (3)"),
        ('{"$ref": "#/definitions/x"}', "/definitions/x"),
        ('{"uniqueItems": true, "type": "array"}', "uniqueItems"),
        ('{"type": "string", "pattern": "(?=a)"}', "look-around"),
        ('{"x-guidance": {"lenient": true}, "not": {}}', "not"),
    ],
)
def test_schema_that_cannot_be_used(compiler: GrammarCompiler, text: str, cause: str) -> None:
    with pytest.raises(InputError) as caught:
        compiler.compile(Grammar("json_schema", text))
    message = str(caught.value)
    assert message.startswith("The JSON schema ")
    assert cause in message
    assert "\n" not in message
    assert len(message) < 400


def chain(count: int, link: str) -> str:
    """A schema whose definitions refer to one another, in a row."""
    definitions = {f"d{i}": json.loads(link % f"#/$defs/d{i + 1}") for i in range(count)}
    definitions[f"d{count}"] = {"type": "null"}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": definitions})


LINKS = [
    '{"$ref": "%s"}',
    '{"type": "object", "properties": {"a": {"$ref": "%s"}}}',
    '{"type": "object", "additionalProperties": {"anyOf": [{"$ref": "%s"}]}}',
]


@pytest.mark.parametrize("link", LINKS)
def test_references_that_lead_to_one_another(compiler: GrammarCompiler, link: str) -> None:
    """5,000 of them ended the process."""
    with pytest.raises(InputError, match=r"more than 1000 of its references lead to one another"):
        compiler.compile(Grammar("json_schema", chain(5000, link)))
    start = compiler.compile(Grammar("json_schema", chain(990, link))).start()
    assert not start.is_stuck


def test_references_that_the_engine_follows_in_another_order(compiler: GrammarCompiler) -> None:
    """It meets the first of them first, we the last: there is room for all that it reads."""
    schema = json.loads(chain(5000, LINKS[1]))
    last_first = [{"$ref": f"#/$defs/d{i}"} for i in range(5000, -1, -1)]
    schema |= {
        "type": "object",
        "additionalProperties": {"anyOf": last_first},
        "properties": {"a": {"$ref": schema.pop("$ref")}},
        "required": ["a"],
    }
    with contextlib.suppress(InputError):
        compiler.compile(Grammar("json_schema", json.dumps(schema)))


SCHEMA_NUMBERS = [
    ('{"const": 9007199254740993}', "const 9007199254740993 is beyond 2^53"),
    ('{"enum": ["a", [{"b": -9007199254740993}]]}', "enum -9007199254740993 is beyond 2^53"),
    ('{"type": "integer", "minimum": 9007199254740993}', "minimum 9007199254740993"),
    ('{"type": "integer", "maximum": 18446744073709551615}', "maximum 18446744073709551615"),
    ('{"exclusiveMinimum": 9007199254740992}', "exclusiveMinimum 9007199254740992 is beyond"),
    ('{"exclusiveMaximum": 1e300}', "exclusiveMaximum 1e+300 is beyond 2^53"),
    ('{"const": 0.12345678901234567891}', "const 0.12345678901234567891 cannot be enforced"),
    ('{"maximum": 1e400}', "maximum 1e400 cannot be enforced"),
    ('{"maximum": ' + "9" * 5000 + "}", "cannot be enforced to the last digit"),
    ('{"properties": {"a": {"items": {"$ref": "#/x/0"}}}, "x": [{"const": 1e17}]}', "const 1e+17"),
    ('{"$ref": "#y", "$defs": {"x": {"$anchor": "y", "const": 1e17}}}', "const 1e+17"),
    ('{"const": "a\\u0001"}', "const has the control character U+0001"),
]


@pytest.mark.parametrize(("text", "cause"), SCHEMA_NUMBERS)
def test_values_that_the_engine_would_change_are_refused(
    compiler: GrammarCompiler, text: str, cause: str
) -> None:
    with pytest.raises(InputError) as caught:
        compiler.compile(Grammar("json_schema", text))
    assert cause in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_pattern_of_many_lines_is_refused(spelling: GrammarCompiler) -> None:
    with pytest.raises(InputError, match="flag x"):
        allows(spelling, {"pattern": "(?x) [^'] # no ["}, "1")


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("xml", "<a/>", "kind is 'xml'; choose json_schema or regex"),
        (None, "a", "kind is None; choose json_schema or regex"),
        ("json_schema", {"type": "object"}, r"text is a dict; give a string, .*json.dumps"),
        ("regex", None, "text is a NoneType; give a string"),
    ],
)
def test_a_grammar_of_another_kind_or_type(kind: Any, text: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Grammar(kind, text)


def test_a_keyword_that_asks_for_nothing(compiler: GrammarCompiler) -> None:
    schema = {"type": "array", "items": {"format": "password"}, "uniqueItems": False}
    assert compiler.compile(Grammar("json_schema", json.dumps(schema)))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"allOf": [{"type": "object"}] * 65}, "its allOf has 65 parts, and at most 64"),
        (
            {"oneOf": [{"type": "integer"}, {"type": "number"}]},
            "a oneOf whose parts may match the same text; anyOf can be enforced",
        ),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ],
)
def test_a_schema_that_is_refused_names_the_keyword(
    compiler: GrammarCompiler, schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compiler.compile(Grammar("json_schema", json.dumps(schema)))
