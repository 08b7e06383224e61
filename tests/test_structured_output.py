"""A grammar constrains every emitted token, drafted or not, and only in its own row."""

from __future__ import annotations

import json
import re

from max.pipelines.context import SamplingParams
from prompts import random_prompt

from unispec.engine import Engine, Request
from unispec.sampling.grammar import Grammar

SCHEMA = Grammar(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "ok": {"type": "boolean"},
                "level": {"enum": ["low", "middle", "high"]},
                "count": {"type": "integer", "minimum": 0, "maximum": 999},
            },
            "required": ["ok", "level", "count"],
            "additionalProperties": False,
        }
    ),
)
DATE = Grammar("regex", "[0-9]{4}-[0-9]{2}-[0-9]{2}")
GRAMMARS = (SCHEMA, DATE, None, SCHEMA, None, DATE, SCHEMA, None)


def requests(temperature: float) -> list[Request]:
    """A full batch, some rows with a grammar."""
    return [
        Request(
            token_ids=random_prompt(256, 5 + 23 * index, seed=5),
            sampling=SamplingParams(temperature=temperature, seed=index, max_new_tokens=120),
            grammar=grammar,
        )
        for index, grammar in enumerate(GRAMMARS)
    ]


def assert_obeyed(grammar: Grammar | None, text: str) -> None:
    if grammar is DATE:
        assert re.fullmatch(DATE.text, text)
    elif grammar is SCHEMA:
        answer = json.loads(text)
        assert answer.keys() == {"ok", "level", "count"}
        assert isinstance(answer["ok"], bool)
        assert answer["level"] in ("low", "middle", "high")
        assert 0 <= answer["count"] <= 999


def test_answers_obey_their_grammar(engine: Engine) -> None:
    for temperature in (0, 1.5):
        results = engine.generate(requests(temperature)).results
        for grammar, result in zip(GRAMMARS, results, strict=True):
            assert_obeyed(grammar, result.text)
            assert grammar is None or result.finish_reason == "stop"


def test_answers_are_the_targets_own(eagle_engine: Engine, target_only_engine: Engine) -> None:
    """With and without a draft, alone and in a batch, a constrained answer is the same."""
    for temperature in (0, 1.5):
        drafted = eagle_engine.generate(requests(temperature))
        alone = [target_only_engine.generate([r]).results[0] for r in requests(temperature)]
        assert [r.token_ids for r in drafted.results] == [r.token_ids for r in alone]


def test_an_answer_that_ignores_eos_ends_where_its_grammar_does(engine: Engine) -> None:
    """The grammar lets "a" end at any time and "b" after five letters only."""
    sampling = SamplingParams(temperature=1.5, seed=1, max_new_tokens=40, ignore_eos=True)
    texts = []
    for pattern in ("a+", "b{5}"):
        request = Request(
            token_ids=random_prompt(256, 9, seed=6),
            sampling=sampling,
            grammar=Grammar("regex", pattern),
        )
        (result,) = engine.generate([request]).results
        texts.append((result.finish_reason, result.text))
    (went_on, letters), ended = texts
    assert went_on == "length"
    assert set(letters) == {"a"}
    assert len(letters) >= 40
    assert ended == ("stop", "bbbbb")
