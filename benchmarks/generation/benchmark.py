"""The measurement: every contender in turn, prompt by prompt, then the checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from .answer import Answer
from .contenders import MEMORY_WATCHED, Contender
from .prompts import Prompt
from .subprocesses import Json, Worker, run_module, start
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
        """Loads each contender once, so that graphs and files are cached for all."""
        for contender in self.contenders:
            self.on_progress(f"preparing: {contender.label}")
            with self._started(contender):
                pass

    def measure(self) -> tuple[dict[str, list[Run]], dict[str, Answers]]:
        """Lets all contenders answer a prompt in turn, then the next prompt.

        Whatever else the machine does in a minute, it does to all of them. Each repeat has
        processes of its own.

        Returns:
            By contender: its runs in the order of the repeats, and its answers to all
            prompts, repeat after repeat.
        """
        runs: dict[str, list[Run]] = {contender.name: [] for contender in self.contenders}
        answers: dict[str, Answers] = {contender.name: [] for contender in self.contenders}
        for repeat in range(self.repeats):
            for name, run in self._repeat(f"repeat {repeat + 1} of {self.repeats}").items():
                runs[name].append(run)
                answers[name] += [answer.token_ids for answer in run.answers]
        return runs, answers

    def _repeat(self, label: str) -> dict[str, Run]:
        runs = {}
        with ExitStack() as stack:
            workers = {}
            for contender in self.contenders:
                self.on_progress(f"{label}: loading {contender.label}")
                begin = perf_counter()
                worker, loaded = stack.enter_context(self._started(contender))
                load_s = perf_counter() - begin
                workers[contender.name] = worker
                runs[contender.name] = Run(load_s=load_s, process_s=load_s, **loaded)
            names = list(workers)
            for index, prompt in enumerate(self.prompts):
                self.on_progress(f"{label}: prompt {index + 1} of {len(self.prompts)}")
                request = {"prompt": prompt.token_ids, "max_new_tokens": self.max_new_tokens}
                first = index % len(names)
                for name in names[first:] + names[:first]:
                    begin = perf_counter()
                    answer = Answer(**workers[name].ask(request))
                    runs[name].process_s += perf_counter() - begin
                    runs[name].answers.append(answer)
        return runs

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
        result = run_module("generation.judge", job, threads=self.threads)
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
                figures[contender.name] = run_module("generation.memory", job, threads=self.threads)
        return figures

    def _started(self, contender: Contender) -> AbstractContextManager[tuple[Worker, Json]]:
        job = {
            "contender": contender.name,
            "model": str(self.model),
            "max_length": self.max_length,
            "warm_up_prompt": list(self.warm_up_prompt),
        }
        return start("generation.worker", job, threads=self.threads)
