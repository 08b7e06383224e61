"""Progress bars of a command's stages, on a terminal and in a file."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from unispec.commands.bar import bars


def shown(console: Console) -> str:
    with bars(console) as show:
        show("collecting", 0.25, "250 tokens")
        show("collecting", 1.0, "1,000 [tokens]")
        show("fitting", 0.5, "loss 1.5")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_on_a_terminal_each_stage_has_a_bar_that_stays() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    last = [line for line in shown(console).splitlines() if "%" in line][-2:]
    for line, parts in zip(
        last,
        (["collecting", "100%", "1,000 [tokens]"], ["fitting", "50%", "loss 1.5"]),
        strict=True,
    ):
        assert all(part in line for part in parts), line


def test_elsewhere_each_stage_has_its_first_and_its_last_line() -> None:
    lines = shown(Console(file=io.StringIO(), width=80)).splitlines()
    assert [line.partition(" s  ")[2] for line in lines] == [
        "collecting   25 %  250 tokens",
        "collecting  100 %  1,000 [tokens]",
        "fitting   50 %  loss 1.5",
    ]


def test_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=80)
    with bars(console) as show:
        for _ in range(25):
            show("fitting", 0.5, "loss")
            now += 1
    assert isinstance(console.file, io.StringIO)
    seconds = [float(line.split()[0]) for line in console.file.getvalue().splitlines()]
    assert seconds == [0, 11, 22, 24]
