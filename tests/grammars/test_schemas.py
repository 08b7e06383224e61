"""What a JSON schema allows, as it is written: numbers, patterns, the order of keys."""

from __future__ import annotations

import itertools
import json
import re

import jsonschema
import pytest
from grammar_states import allows

from unispec.sampling.grammar import GrammarCompiler


def test_numbers_up_to_2_53_are_enforced(spelling: GrammarCompiler) -> None:
    edge = 2**53
    for number in (edge - 1, edge, edge + 1):
        assert allows(spelling, {"const": edge}, str(number)) == (number == edge)
        assert allows(spelling, {"type": "integer", "minimum": edge}, str(number)) == (
            number >= edge
        )
        assert allows(spelling, {"type": "integer", "maximum": edge - 1}, str(number)) == (
            number < edge
        )
    assert allows(spelling, {"default": 2**70, "type": "null"}, "null")


PATTERNS = [
    r'^[^"]*$',
    r"^[^\\]*$",
    r'^[^"\\]*$',
    r'^[^]"]*$',
    r'^[^\n"]*$',
    r'^[^\s"]+$',
    r'^(?:[^"]|\\)*$',
    r'^\[[^"]{0,3}\]$',
    r'[^"]',
    r"^[^a-z]+$",
    r'^[a-z"]*$',
    r"^.*$",
    r"^\W*$",
]
STRINGS = ["", "a", '"', "\\", 'a"', "a\\", "\n", "é🙂", "[b]", "a b", "]", '\\"', '["]', "["]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_strings_and_keys(spelling: GrammarCompiler, pattern: str) -> None:
    """Quotes and backslashes passed classes that leave them out."""
    keyed = {"patternProperties": {pattern: {}}, "additionalProperties": False}
    for text in STRINGS:
        # Python's $ also matches before an end of line.
        right = re.search(re.sub(r"\$$", r"\\Z", pattern), text, re.ASCII) is not None
        written = json.dumps(text, ensure_ascii=False)
        assert allows(spelling, {"type": "string", "pattern": pattern}, written) == right, text
        assert allows(spelling, keyed | {"type": "object"}, f"{{{written}:1}}") == right, text


def test_a_pattern_behind_an_anchor(spelling: GrammarCompiler) -> None:
    schema = {"$ref": "#x", "$defs": {"y": {"$anchor": "x", "type": "string", "pattern": '^[^"]$'}}}
    assert allows(spelling, schema, '"a"')
    assert not allows(spelling, schema, r'"\""')


PERSON = {"name": {"type": "string"}, "age": {"type": "integer"}, "pet": {"type": "null"}}
WHOLE = ['"name": "x"', '"age": 3', '"pet": null', '"names": [1]']


@pytest.mark.parametrize("free", [{}, {"additionalProperties": True}, {"additionalProperties": {}}])
def test_optional_properties_come_in_any_order(
    spelling: GrammarCompiler, free: dict[str, object]
) -> None:
    schema = {"type": "object", "properties": PERSON, **free}
    for size in range(len(WHOLE) + 1):
        for members in itertools.permutations(WHOLE, size):
            assert allows(spelling, schema, "{" + ", ".join(members) + "}"), members
    for wrong in ('"name": 3', '"age": "x"', '"pet": 0', r'"n\u0061me": 3'):
        for before in ([], WHOLE[1:2], WHOLE[3:]):
            assert not allows(spelling, schema, "{" + ", ".join([*before, wrong]) + "}"), wrong


def test_required_properties_come_first_and_in_the_order_of_the_schema(
    spelling: GrammarCompiler,
) -> None:
    """Optional ones before them come at their place, or later."""
    schema = {"type": "object", "properties": PERSON, "required": ["age"]}
    for members in itertools.permutations(WHOLE):
        early = members[: members.index(WHOLE[1])]
        text = "{" + ", ".join(members) + "}"
        assert allows(spelling, schema, text) == (early in [(), (WHOLE[0],)]), text
    two = {**schema, "required": ["age", "name"]}
    assert allows(spelling, two, '{"name": "", "age": 1, "x": 0, "pet": null}')
    assert not allows(spelling, two, '{"age": 1, "name": ""}')
    assert not allows(spelling, two, '{"name": ""}')


def test_without_other_keys_the_order_is_that_of_the_schema(spelling: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": PERSON, "additionalProperties": False}
    for size in range(4):
        for members in itertools.permutations(WHOLE[:3], size):
            right = [*members] == [member for member in WHOLE if member in members]
            assert allows(spelling, schema, "{" + ", ".join(members) + "}") == right, members


def test_order_in_schemas_that_are_put_together(spelling: GrammarCompiler) -> None:
    tree = {
        "type": "object",
        "properties": {"next": {"$ref": "#"}, "kind": {"enum": ["a"]}, "size": {"type": "integer"}},
        "required": ["kind"],
        "$defs": {"unused": {}},
    }
    assert allows(spelling, tree, '{"next": {"kind": "a", "size": 1}, "kind": "a"}')
    assert allows(
        spelling, tree, '{"kind": "a", "size": 1, "next": {"kind": "a", "next": {"kind": "a"}}}'
    )
    assert not allows(spelling, tree, '{"kind": "a", "next": {"size": 1}}')
    either = {"properties": PERSON, "anyOf": [{"required": ["name"]}, {"required": ["age"]}]}
    assert allows(spelling, either, '{"name": "", "age": 1, "x": 0}')
    assert not allows(spelling, either, '{"age": 1, "name": ""}')
    assert not allows(spelling, either, '{"pet": null}')
    both = {
        "allOf": [{"type": "object", "properties": PERSON}, {"properties": {"x": {"const": 1}}}]
    }
    assert allows(spelling, both, '{"name": "", "age": 1, "x": 1}')
    assert not allows(spelling, both, '{"x": 1, "age": 1}')
    assert not allows(spelling, both, '{"age": 1, "x": 2}')
    # Alternatives of which each stands alone, and a reference alone, are not put together.
    maybe = {
        "anyOf": [{"type": "null"}, {"$ref": "#/$defs/p"}],
        "$defs": {"p": {"type": "object", "properties": PERSON}},
    }
    assert allows(spelling, maybe, '{"age": 1, "name": ""}')
    counted = {"type": "object", "properties": PERSON, "required": [*PERSON], "maxProperties": 3}
    assert allows(spelling, counted, '{"name": "", "age": 1, "pet": null}')
    # A path through `properties` keeps the order of the schema.
    path = {"properties": {"a": {"type": "null"}, "b": {"$ref": "#/properties/a"}}}
    assert allows(spelling, path, '{"a": null, "b": null}')
    assert not allows(spelling, path, '{"a": null, "b": 1}')


BASE: dict[str, object] = {
    "properties": {"id": {"const": 1}, "note": {"type": "string"}},
    "required": ["id"],
}
PUT_TOGETHER: list[tuple[dict[str, object], str]] = [
    (
        {
            "allOf": [
                {"$ref": "#/$defs/B"},
                {"properties": {"k": {"const": 2}}, "required": ["k"]},
            ],
            "$defs": {"B": BASE},
        },
        '{"id": 1, "note": "s", "k": 2}',
    ),
    (
        {
            "properties": {"a": {"type": "integer"}},
            "anyOf": [
                {"properties": {"a": {"const": 1}}, "required": ["a"]},
                {"properties": {"b": {"type": "string"}}, "required": ["b"]},
            ],
        },
        '{"a": 2, "b": "x"}',
    ),
    ({"properties": {"a": {}}, "required": ["c"]}, '{"a": 1, "c": 1}'),
    (
        {
            "allOf": [
                {"properties": {"in": BASE}},
                {"properties": {"in": {"properties": {"k": {}}, "required": ["k"]}}},
            ]
        },
        '{"in": {"id": 1, "note": "s", "k": 2}}',
    ),
    (
        {
            "properties": {"in": BASE},
            "required": ["in"],
            "patternProperties": {"^in": {"properties": {"k": {}}, "required": ["k"]}},
        },
        '{"in": {"id": 1, "note": "s", "k": 2}}',
    ),
]


@pytest.mark.parametrize(("schema", "text"), PUT_TOGETHER)
def test_the_order_of_the_schema_is_always_right(
    spelling: GrammarCompiler, schema: dict[str, object], text: str
) -> None:
    jsonschema.validate(json.loads(text), schema)
    assert allows(spelling, schema, text)


def test_a_required_property_that_is_not_declared_comes_behind_those_that_are(
    spelling: GrammarCompiler,
) -> None:
    schema = {"properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["c"]}
    members = ['"a": 1', '"b": 2', '"c": 3']
    for size in range(4):
        for some in itertools.permutations(members, size):
            right = '"c": 3' in some and some[:2] != (members[1], members[0])
            assert allows(spelling, schema, "{" + ", ".join(some) + "}") == right, some
    assert not allows(spelling, schema, '{"c": 3, "a": 2}')


def test_many_optional_properties_before_a_required_one(spelling: GrammarCompiler) -> None:
    """The fewer, the more of their orders; the key never has to become another one."""
    for count in (5, 15, 60):
        names = [f"p{i}" for i in range(count)]
        schema = {
            "properties": {key: {"const": 1} for key in [*names, "z"]},
            "required": ["z"],
        }

        def written(order: list[str], schema: object = schema) -> bool:
            return allows(spelling, schema, json.dumps(dict.fromkeys(order, 1)))

        assert written([*names, "z"])
        assert written(["z", *names[::-1]])
        assert written(["p1", "p3", "z"])
        assert written(["p1", "z", "p3"]) == (count < 60)
        assert written(["p1", "p3", "z", "p2"]) == (count == 5)
        assert not written([*names])
        assert not written(["p3", "p1", "z"])
        assert not allows(spelling, schema, '{"z": 1, "p3": 2}')


def test_optional_properties_beside_patterns_come_in_any_order(spelling: GrammarCompiler) -> None:
    schema: dict[str, object] = {
        "properties": {"a": {"type": "integer"}, "b": {"type": "null"}},
        "patternProperties": {"^x": {"type": "string"}},
    }
    for members in itertools.permutations(['"a": 1', '"b": null', '"x1": "s"', '"ab": []']):
        assert allows(spelling, schema, "{" + ", ".join(members) + "}"), members
    assert not allows(spelling, schema, '{"x1": "s", "a": "s"}')
    # A pattern that names a declared property leaves it at its place.
    schema["patternProperties"] = {"^[ax]": {"minimum": 3}}
    assert allows(spelling, schema, '{"a": 3, "b": null, "x1": "s"}')
    assert not allows(spelling, schema, '{"x1": "s", "a": 2}')
    assert not allows(spelling, schema, '{"a": 2}')


def test_alternatives_of_many_objects_do_not_exhaust_the_engine(spelling: GrammarCompiler) -> None:
    """It gives up in the middle of a text where too much is open at once."""
    common = {key: {"const": 1} for key in "abcdefgh"}
    each = [{"properties": common | {f"k{i}": {"const": i}}, "required": ["h"]} for i in range(60)]
    assert allows(spelling, {"anyOf": each}, '{"a": 1, "c": 1, "h": 1, "k7": 7}')
