"""Who takes part: the target alone, each fixed number of drafts, and what chooses by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, Final, Literal

from max.pipelines.context import SamplingParams

from unispec.checkpoints.demo import demo_draft_folder
from unispec.engine import Engine, EngineConfig, Request, Step

__all__ = ["CONTENDERS", "Contender", "Engines", "decode_speed"]

Speculating = Literal["alone", "ngram", "draft", "both"]


@dataclass(frozen=True)
class Contender:
    """One way to answer."""

    name: str
    engine: Speculating
    """Who may propose."""
    count: int | Literal["auto"]
    """K; 0 for the target alone."""

    @property
    def is_fixed(self) -> bool:
        """Whether it is one of the choices that `auto` is compared with."""
        return self.count != "auto"


CONTENDERS: Final = (
    Contender("alone", "alone", 0),
    Contender("draft K=1", "draft", 1),
    Contender("draft K=2", "draft", 2),
    Contender("draft K=3", "draft", 3),
    Contender("draft K=5", "draft", 5),
    Contender("ngram K=4", "ngram", 4),
    Contender("ngram K=8", "ngram", 8),
    Contender("both K=1", "both", 1),
    Contender("both K=3", "both", 3),
    Contender("ngram auto", "ngram", "auto"),
    Contender("draft auto", "draft", "auto"),
    Contender("auto", "both", "auto"),
)
"""The last one is what runs if nothing is asked for."""

_DRAFT: Final = {"draft_model": str(demo_draft_folder("eagle3")), "speculative_method": "eagle3"}
_OPTIONS: Final[dict[Speculating, dict[str, Any]]] = {
    "alone": {},
    "ngram": {"speculative_method": "ngram"},
    "draft": {**_DRAFT, "prompt_lookup_max": 0},
    "both": _DRAFT,
}


class Engines:
    """One engine for each kind of contender, loaded when first asked for."""

    def __init__(self, model: str, encoding: str | None, max_batch_size: int, pages: int) -> None:
        self._shared: dict[str, Any] = {
            "model": model,
            "quantization_encoding": encoding,
            "max_batch_size": max_batch_size,
            "kv_cache_pages": pages,
        }
        self._engines: dict[Speculating, Engine] = {}

    def of(self, contender: Contender) -> Engine:
        """The contender's, set to its K."""
        kind = contender.engine
        if kind not in self._engines:
            self._engines[kind] = Engine(EngineConfig(**self._shared, **_OPTIONS[kind]))
            self._engines[kind].load()
        engine = self._engines[kind]
        if contender.count:
            engine.num_speculative_tokens = contender.count
        return engine

    @property
    def any(self) -> Engine:
        """For its tokenizer."""
        return self.of(CONTENDERS[0])


def decode_speed(
    engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[float, list[list[int]]]:
    """Tokens a second in decode steps, all rows together, and the answers.

    NaN where no step had all rows: short answers end while the last prompts are read.
    """
    seconds, tokens = 0.0, 0

    def note(step: Step) -> None:
        nonlocal seconds, tokens
        # The end of a batch, where few rows are left, is another batch size.
        if step.times.is_decode and len(step.rows) == len(prompts):
            seconds += step.times.wall_s
            tokens += sum(len(row.token_ids) for row in step.rows)

    sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens, ignore_eos=True)
    engine.on_step = note
    report = engine.generate([Request(token_ids=ids, sampling=sampling) for ids in prompts])
    engine.on_step = None
    return tokens / seconds if seconds else nan, [result.token_ids for result in report.results]
