"""The measurement: every contender in turn, several times, then the checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contenders import MEMORY_WATCHED, Contender
from .machine import load_average
from .prompts import Prompt
from .subprocesses import run_module
from .summary import Run

__all__ = ["Benchmark", "Judgement"]

Answers = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A contender's answers, over prompts and repeats; see `judge` for the words."""

    exact: int
    tied: int
    wrong: int
    inexact: list[dict[str, Any]]
    """Of each answer that is not exact: its prompt's index, verdict, position and distance."""

    @classmethod
    def of(cls, judged: Sequence[dict[str, Any]]) -> Judgement:
        """Counts the verdicts."""
        verdicts = [item["verdict"] for item in judged]
        return cls(
            exact=verdicts.count("exact"),
            tied=verdicts.count("tied"),
            wrong=verdicts.count("wrong"),
            inexact=[item for item in judged if item["verdict"] != "exact"],
        )


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is run, and how often."""

    model: Path
    contenders: Sequence[Contender]
    prompts: Sequence[Prompt]
    warm_up_prompt: Sequence[int]
    max_new_tokens: int
    repeats: int
    threads: int
    max_length: int
    on_progress: Callable[[str], None]

    def prepare(self) -> None:
        """Runs each contender for a moment, so that graphs and files are cached for all."""
        for contender in self.contenders:
            self.on_progress(f"preparing: {contender.label}")
            self._run(contender, prompts=[])

    def measure(self) -> tuple[dict[str, list[Run]], dict[str, Answers]]:
        """Runs all contenders, then all again, so that a slow minute does not hit only one.

        Returns:
            By contender: its runs in the order of the repeats, and its answers to all
            prompts, repeat after repeat.
        """
        runs: dict[str, list[Run]] = {contender.name: [] for contender in self.contenders}
        answers: dict[str, Answers] = {contender.name: [] for contender in self.contenders}
        kinds = [prompt.kind for prompt in self.prompts]
        for repeat in range(self.repeats):
            for contender in _rotated(self.contenders, repeat):
                self.on_progress(f"repeat {repeat + 1} of {self.repeats}: {contender.label}")
                load = load_average()
                result, process_s = self._run(contender, prompts=self.prompts)
                run = Run.of(result, kinds, process_s=process_s, load=load)
                runs[contender.name].append(run)
                answers[contender.name] += [answer["token_ids"] for answer in result["answers"]]
        return runs, answers

    def judge(self, answers: Mapping[str, Answers]) -> dict[str, Judgement]:
        """Holds each contender's answers against what the target alone writes."""
        self.on_progress("holding the answers against the target")
        asked = [tuple(prompt.token_ids) for prompt in self.prompts]
        pairs = {
            name: [(index % len(asked), tuple(answer)) for index, answer in enumerate(given)]
            for name, given in answers.items()
        }
        distinct = list(dict.fromkeys(pair for given in pairs.values() for pair in given))
        job = {
            "model": str(self.model),
            "max_new_tokens": self.max_new_tokens,
            "answers": [{"prompt": asked[index], "answer": answer} for index, answer in distinct],
        }
        result, _ = run_module("judge", job, threads=self.threads)
        judged = dict(zip(distinct, result["judgements"], strict=True))
        return {
            name: Judgement.of([{"prompt": pair[0], **judged[pair]} for pair in given])
            for name, given in pairs.items()
        }

    def host_memory(self, max_new_tokens: int) -> dict[str, Any]:
        """What the steps of ours leave behind on the host, fused and alone; see `memory`."""
        figures = {}
        for contender in self.contenders:
            if contender.name in MEMORY_WATCHED:
                self.on_progress(f"host memory: {contender.label}")
                job = {
                    "model": str(self.model),
                    "method": contender.method,
                    "draft_tokens": contender.draft_tokens,
                    "max_length": self.max_length,
                    "max_new_tokens": max_new_tokens,
                    "prompt": list(self.warm_up_prompt),
                }
                figures[contender.name], _ = run_module("memory", job, threads=self.threads)
        return figures

    def _run(
        self, contender: Contender, *, prompts: Sequence[Prompt]
    ) -> tuple[dict[str, Any], float]:
        job = {
            "contender": contender.name,
            "model": str(self.model),
            "max_length": self.max_length,
            "max_new_tokens": self.max_new_tokens,
            "prompts": [prompt.token_ids for prompt in prompts],
            "warm_up_prompt": list(self.warm_up_prompt),
        }
        return run_module("worker", job, threads=self.threads)


def _rotated(contenders: Sequence[Contender], by: int) -> list[Contender]:
    """Each repeat begins with another contender."""
    start = by % len(contenders)
    return [*contenders[start:], *contenders[:start]]
