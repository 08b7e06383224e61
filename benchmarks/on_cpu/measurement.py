"""The measurement of one number format: every contender in turn, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import NamedTuple

from generation.subprocesses import Json, Worker, start

from .answer import Answer
from .budget import Budget
from .contenders import Contender
from .interpreters import Interpreters
from .texts import Texts

__all__ = ["Cell", "Measured", "Measurement"]

_WARM_UP_TOKENS = 4
_MODULES = {"llama.cpp": "on_cpu.llama_worker", "openvino": "on_cpu.openvino_worker"}


class Cell(NamedTuple):
    """What a contender has to do."""

    rows: int
    """Prompts at a time."""
    context: int
    """About how many tokens each of them has."""

    def __str__(self) -> str:
        return f"batch {self.rows}, context about {self.context}"


@dataclass(kw_only=True)
class Measured:
    """All that was measured of one format; it grows."""

    answers: dict[Cell, dict[str, list[Answer]]] = field(default_factory=dict)
    """By contender, of each round."""
    prefill_s: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    """Time to the first token by length of the prompt and contender, of each round."""
    about: dict[str, str] = field(default_factory=dict)
    """What contenders say of themselves."""
    missing: dict[str, str] = field(default_factory=dict)
    """Contenders that could not be measured, and why."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is run, and how often."""

    contenders: Sequence[Contender]
    jobs: Mapping[str, Json]
    """By contender, what it loads."""
    interpreters: Interpreters
    texts: Texts
    cells: Sequence[Cell]
    prefills: Sequence[int]
    """Lengths of prompts whose first token is timed."""
    max_new_tokens: int
    rounds: int
    threads: int
    budget: Budget
    on_progress: Callable[[str], None]

    def run(self) -> Measured:
        """Lets all contenders answer a batch in turn, then the next one.

        Whatever else the machine does in a minute, it does to all of them. Each round begins
        with another contender.
        """
        measured = Measured()
        with ExitStack() as stack:
            workers = self._load(stack, measured)
            for cell in self.cells:
                prompts = partial(self.texts.batch, cell.context, cell.rows)
                measured.answers[cell] = self._rounds(
                    str(cell), workers, measured, prompts, self.max_new_tokens
                )
            for length in self.prefills:
                label = f"prompts of {length} tokens"
                prompts = partial(self._prefill, length)
                answers = self._rounds(label, workers, measured, prompts, 1)
                measured.prefill_s[length] = {
                    name: [answer.first_token_s for answer in given]
                    for name, given in answers.items()
                }
        return measured

    def _prefill(self, length: int, turn: int) -> list[list[int]]:
        return [self.texts.prefill(length, turn)]

    def _load(self, stack: ExitStack, measured: Measured) -> dict[str, Worker]:
        """Starts all contenders and has each answer once for every size of a batch."""
        workers = {}
        for contender in self.contenders:
            self.on_progress(f"loading {contender.label}")
            reason = self.interpreters.missing(contender.system)
            if reason is not None:
                measured.missing[contender.name] = reason
                continue
            module = _MODULES.get(contender.system, "on_cpu.worker")
            python = self.interpreters.of(contender.system)
            job = self.jobs[contender.name]
            try:
                worker, said = stack.enter_context(
                    start(
                        module,
                        job,
                        threads=self.threads,
                        python=python,
                        own_allocator=contender.system in _MODULES,
                    )
                )
                for rows in sorted({cell.rows for cell in self.cells}):
                    prompts = [self.texts.prefill(8 + row, row) for row in range(rows)]
                    _ask(worker, prompts, _WARM_UP_TOKENS)
            except RuntimeError as error:
                measured.missing[contender.name] = _reason(error)
                continue
            workers[contender.name] = worker
            measured.about[contender.name] = said["about"]
        return workers

    def _rounds(
        self,
        label: str,
        workers: dict[str, Worker],
        measured: Measured,
        prompts: Callable[[int], Sequence[Sequence[int]]],
        max_new_tokens: int,
    ) -> dict[str, list[Answer]]:
        """At least one round, and the answers by contender.

        One that fails takes part in nothing more, and has no answers.
        """
        answers: dict[str, list[Answer]] = {name: [] for name in workers}
        with self.budget.part() as deadline:
            for turn in range(self.rounds):
                if turn and monotonic() > deadline:
                    break
                self.on_progress(f"{label}: round {turn + 1} of {self.rounds}")
                names = list(workers)
                first = turn % max(len(names), 1)
                for name in names[first:] + names[:first]:
                    try:
                        answer = _ask(workers[name], prompts(turn), max_new_tokens)
                    except RuntimeError as error:
                        measured.missing[name] = f"{label}: {_reason(error)}"
                        del workers[name], answers[name]
                    else:
                        answers[name].append(answer)
        return answers


def _ask(worker: Worker, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Answer:
    request = {"prompts": [list(prompt) for prompt in prompts], "max_new_tokens": max_new_tokens}
    return Answer(**worker.ask(request))


def _reason(error: RuntimeError) -> str:
    """The last thing that a process said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1]
