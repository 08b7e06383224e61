"""What the command prints: JSON, tables, streams, progress, and how it ends."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_engine import FakeEngine, run
from rich.console import Console

from unispec import engine as engine_package
from unispec.commands.console import Answers, progress, summary


def test_json_is_all_there_is_on_stdout(engine: type[FakeEngine], model: Path) -> None:
    engine.during_generate = staticmethod(lambda: print("a library speaks"))
    result = run("--model", model, "--prompt", "hello", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "results": [
            {
                "prompt": "hello",
                "text": "one two",
                "token_ids": [10, 20, 30],
                "finish_reason": "length",
                "drafted": 4,
                "accepted": 3,
            }
        ],
        "mean_acceptance_length": 2.25,
        "acceptance_per_position": [0.75, 0.5],
        "tokens_per_second": 123.456,
        "time_to_first_token_s": 0.375,
        "step_time_s": 0.0125,
    }
    assert "a library speaks" in result.stderr
    assert not engine.made[0].streamed


def test_json_has_log_probabilities_where_they_are_asked_for(
    engine: type[FakeEngine], model: Path
) -> None:
    result = run("--model", model, "--prompt", "hello", "--json", "--logprobs", "2")
    assert json.loads(result.stdout)["results"][0]["logprobs"] == [
        {
            "token_id": 10,
            "logprob": -0.5,
            "top": [{"token_id": 10, "logprob": -0.5}, {"token_id": 11, "logprob": -1.25}],
        },
        {
            "token_id": 20,
            "logprob": -2.0,
            "top": [{"token_id": 21, "logprob": -0.25}, {"token_id": 22, "logprob": -1.75}],
        },
        {"token_id": 30, "logprob": -0.125, "top": []},
    ]
    assert [request.logprobs for request in engine.made[0].requests] == [2]


def test_json_keeps_prompt_order_and_any_character(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    prompts = ["hello", "wörld \u2028 日本", '"quoted" [bold]']
    (tmp_path / "prompts").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    result = run("--model", model, "--prompt-file", tmp_path / "prompts", "--json")
    assert [entry["prompt"] for entry in json.loads(result.stdout)["results"]] == prompts
    assert result.stdout.count("\n") == 1


def test_json_has_null_for_what_was_not_measured(engine: type[FakeEngine], model: Path) -> None:
    engine.step_time_s = math.nan
    result = run("--model", model, "--prompt", "hello", "--json")
    assert json.loads(result.stdout)["step_time_s"] is None


def test_one_answer_is_the_whole_output(engine: type[FakeEngine], model: Path) -> None:
    engine.during_generate = staticmethod(lambda: print("a library speaks"))
    result = run("--model", model, "--prompt", "hello")
    assert result.exit_code == 0
    assert result.stdout == "one two\n"


def test_warnings_of_libraries_are_kept_off_the_terminal(
    engine: type[FakeEngine], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Pillow's for an image of 100 million pixels, which it reads; `python -W` shows them."""
    heard: list[int] = []

    def warn() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn("a library warns", stacklevel=1)
        heard.append(len(caught))

    engine.during_generate = staticmethod(warn)
    for options in ([], ["always"]):
        monkeypatch.setattr(sys, "warnoptions", options)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert run("--model", model, "--prompt", "hello").exit_code == 0
    assert heard == [0, 1]


def test_progress_comes_in_order_without_a_terminal(engine: type[FakeEngine], model: Path) -> None:
    lines = run("--model", model, "--prompt", "hello").stderr.splitlines()
    phases = [line.split(" s  ")[1] for line in lines if re.match(r" +\d+\.\d s  ", line)]
    assert phases == [
        "starting MAX",
        "loading weights",
        "compiling",
        "ready",
        "generating",
    ]


def test_table_shows_the_numbers(engine: type[FakeEngine], model: Path) -> None:
    lines = run("--model", model, "--prompt", "hello").stderr.splitlines()
    rows = [line.split("│")[1:3] for line in lines if line.startswith("│")]
    assert {name.strip(): value.strip() for name, value in rows} == {
        "tokens": "3",
        "tokens/s": "123.5",
        "time to first token": "0.38 s",
        "step time": "12.5 ms",
        "mean acceptance length": "2.25",
        "acceptance per position": "75% 50%",
    }


def test_table_of_a_batch_without_speculation() -> None:
    result = engine_package.Result(
        token_ids=[1, 2], text="", finish_reason="stop", drafted=0, accepted=0
    )
    report = engine_package.Report(
        results=[result, result, result],
        acceptance_per_position=[],
        mean_acceptance_length=1.0,
        tokens_per_second=1.0,
        time_to_first_token_s=1.0,
        step_time_s=math.nan,
        graph_time_s=math.nan,
        steps=0,
    )
    terminal = Console(file=io.StringIO(), width=80)
    terminal.print(summary(report))
    assert isinstance(terminal.file, io.StringIO)
    shown = " ".join(terminal.file.getvalue().split())
    for row in ("prompts │ 3", "tokens │ 6", "step time │ -", "per position │ -"):
        assert row in shown


def test_several_answers_stand_under_their_prompts(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts").write_text(f"hello\n{'world ' * 40}\n\n")
    result = run("--model", model, "--prompt-file", tmp_path / "prompts")
    lines = result.stdout.splitlines()
    assert lines[:3] == ["[1/2] hello", "one two", ""]
    assert lines[3].startswith("[2/2] world world")
    assert len(lines[3]) <= 80
    assert lines[4:] == ["one two"]


def test_answers_stream_in_prompt_order() -> None:
    stream = io.StringIO()
    answers = Answers(["p", "q", "r"], stream)

    def shown_after(step: Callable[..., None], *arguments: object) -> str:
        start = len(stream.getvalue())
        step(*arguments)
        return stream.getvalue()[start:]

    assert shown_after(answers.add, 1, "second") == ""
    assert shown_after(answers.add, 0, "fi") == "[1/3] p\nfi"
    assert shown_after(answers.finish, 1) == ""
    assert shown_after(answers.add, 0, "rst") == "rst"
    assert shown_after(answers.add, 2, "thi") == ""
    assert shown_after(answers.finish, 0) == "\n\n[2/3] q\nsecond\n\n[3/3] r\nthi"
    assert shown_after(answers.add, 2, "rd\n") == "rd\n"
    assert shown_after(answers.finish, 2) == ""


def test_an_empty_answer_is_an_empty_output() -> None:
    stream = io.StringIO()
    Answers(["p"], stream).finish(0)
    assert stream.getvalue() == ""


def test_spinner_on_a_terminal_shows_the_phase_and_leaves_nothing() -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=80, color_system=None)
    with progress(terminal) as phase:
        phase("compiling [first run]")
        assert "\x1b[?25l" in stream.getvalue()
    shown = stream.getvalue()
    assert "compiling [first run] 0:00:00" in shown
    assert shown.endswith("\x1b[2K")
    assert "\x1b[?25h" in shown


def test_ctrl_c_is_status_130_and_quiet(engine: type[FakeEngine], model: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    engine.during_generate = staticmethod(interrupt)
    result = run("--model", model, "--prompt", "hello")
    assert result.exit_code == 130
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "Aborted" not in result.stderr


def test_a_defect_is_not_disguised(engine: type[FakeEngine], model: Path) -> None:
    def break_down() -> None:
        raise RuntimeError("a defect")

    engine.during_generate = staticmethod(break_down)
    with pytest.raises(RuntimeError, match="a defect"):
        run("--model", model, "--prompt", "hello")
