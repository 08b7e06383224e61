"""Random JSON schemas: what is written satisfies them, and nothing right is refused."""

from __future__ import annotations

import json
import random

import jsonschema
import numpy as np
import pytest
from grammar_states import allows, tokens_of
from transformers import PreTrainedTokenizerFast

from unispec.errors import InputError
from unispec.sampling.grammar import Grammar, GrammarCompiler


def random_part(choose: random.Random, depth: int) -> dict[str, object]:
    """What a schema says of an object: properties, required ones, other keys."""
    leaves: list[dict[str, object]] = [{}, {"type": "integer"}, {"type": "string"}, {"const": 1}]
    part: dict[str, object] = {}
    if choose.random() < 0.85:
        names = choose.sample(["a", "b", "c", "x1"], choose.randint(1, 3))
        part["properties"] = {
            name: random_combination(choose, depth + 1)
            if depth < 1 and choose.random() < 0.3
            else choose.choice(leaves)
            for name in names
        }
    if choose.random() < 0.5:
        part["required"] = choose.sample(["a", "b", "c", "d"], choose.randint(1, 2))
    if choose.random() < 0.2:
        part["patternProperties"] = {choose.choice(["^x", "1$", "^a"]): choose.choice(leaves)}
    if choose.random() < 0.2:
        part["additionalProperties"] = choose.choice([False, *leaves])
    return part


def random_combination(choose: random.Random, depth: int = 0) -> dict[str, object]:
    """A schema of parts that are put together, or are alternatives, or stand alone."""
    reference = {"$ref": f"#/$defs/{choose.choice('AB')}"}
    schema = random_part(choose, depth) if choose.random() < 0.7 else {}
    kind = choose.choice(["allOf", "anyOf", "$ref", "", ""])
    if kind == "$ref":
        schema |= reference
    elif kind:
        schema[kind] = [
            choose.choice([reference, random_part(choose, depth)])
            for _ in range(choose.randint(1, 2))
        ]
    if choose.random() < 0.5:
        schema["type"] = "object"
    return schema


def random_object(choose: random.Random, depth: int = 0) -> dict[str, object]:
    keys = choose.sample(["a", "b", "c", "d", "x1", "ab"], choose.randint(0, 4))
    return {
        key: random_object(choose, 1)
        if depth == 0 and choose.random() < 0.25
        else choose.choice([1, 1, 1, 2, "s"])
        for key in keys
    }


def test_freeing_the_order_refuses_nothing_and_allows_nothing_wrong(
    spelling: GrammarCompiler, tokenizer_of_bytes: PreTrainedTokenizerFast
) -> None:
    """Of random schemas and texts; in the schema's order is what the engine allows by itself."""
    choose = random.Random(0)
    plain = GrammarCompiler(tokenizer_of_bytes, 257, [256])
    kept = freed = 0
    for _ in range(150):
        schema = random_combination(choose)
        schema["$defs"] = {"A": random_part(choose, 1), "B": random_part(choose, 1)}
        right = jsonschema.Draft202012Validator(schema)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("unispec.sampling.grammar.rewrite_schema", lambda text: [text])
            try:
                plain.compile(Grammar("json_schema", json.dumps(schema)))
            except InputError:
                continue
        for _ in range(30):
            value = random_object(choose)
            text = json.dumps(value)
            if allows(plain, schema, text):
                kept += 1
                assert allows(spelling, schema, text), (schema, text)
            elif not right.is_valid(value):
                assert not allows(spelling, schema, text), (schema, text)
            else:
                freed += allows(spelling, schema, text)
    assert kept > 300
    assert freed > 50


def random_schema(choose: random.Random, depth: int = 0) -> dict[str, object]:
    """An object of few properties, some of them objects, lists or strings with a pattern."""
    leaves: list[dict[str, object]] = [
        {"type": "integer", "minimum": -3, "maximum": 12},
        {"type": "string", "pattern": '^[^"]{0,3}$'},
        {"type": "string", "pattern": r"^[^\\]?$", "maxLength": 3},
        {"enum": ["a", "é\n", 1, None]},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    ]
    if depth == 2:
        return choose.choice(leaves)
    names = choose.sample(["a", "ab", "x y", 'q"', "name", "é"], choose.randint(1, 4))
    schema: dict[str, object] = {
        "type": "object",
        "properties": {
            name: random_schema(choose, choose.choice([depth + 1, 2])) for name in names
        },
        "required": choose.sample(names, choose.randint(0, len(names))),
    }
    other = [None, None, True, False, {"type": "integer"}]
    if (additional := choose.choice(other)) is not None:
        schema["additionalProperties"] = additional
    return schema


@pytest.mark.parametrize("seed", range(60))
def test_what_is_written_satisfies_a_random_schema(spelling: GrammarCompiler, seed: int) -> None:
    choose = random.Random(seed)
    schema = random_schema(choose)
    state = spelling.compile(Grammar("json_schema", json.dumps(schema))).start()
    text = b""
    while not state.is_complete and len(text) < 400:
        bitmask = np.zeros((1, 9), dtype=np.int32)
        state.fill_bitmask(bitmask, [])
        tokens = sorted(tokens_of(bitmask[0]) - set(b" \t\n\r")) or [32]
        ending = [token for token in tokens if token in {*b'}],":', 256}]
        token = choose.choice(ending if ending and choose.random() < 0.4 else tokens)
        state.accept(token)
        if token == 256:
            break
        text += bytes([token])
    if state.is_complete:
        jsonschema.validate(json.loads(text), schema)
