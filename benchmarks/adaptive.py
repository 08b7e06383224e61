"""Whether steps that choose K by themselves are as fast as the best fixed K, in each situation.

SmolLM2-135M-Instruct with its EAGLE-3 draft on a CPU: the target alone, each fixed K, n-grams, the
draft, both, and both with K chosen by each step, on prompts of five kinds, in batches and contexts
of several sizes. All contenders answer the prompts of a cell in turn, round by round; a cell has
the median of its rounds. A speed is that of decode steps with all rows of the batch. Answers are
greedy, go on beyond their end, and have to be the target's own.
"""

# ruff: noqa: E402
from __future__ import annotations

from unispec.allocator import restart_with_jemalloc
from unispec.waiting import wait_asleep

# Before MAX is imported, as the command line does.
restart_with_jemalloc()
wait_asleep()

import json
import os
from pathlib import Path
from statistics import median
from typing import Any

import click
from adaptive_k.contenders import CONTENDERS, Engines, decode_speed
from adaptive_k.plot import plot_cells
from adaptive_k.prompts import KINDS, prompts_of
from rich.console import Console
from rich.table import Table

from unispec.checkpoints.demo import demo_model_folder, ensure_demo_model

RESULTS = Path(__file__).parent / "results"
GOAL = 0.98
PAGE = 128


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--kinds", type=click.Choice(list(KINDS)), multiple=True, default=list(KINDS))
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=[1, 2, 4, 8])
@click.option("--context", "contexts", type=click.IntRange(1), multiple=True, default=[100, 3000])
@click.option("--new-tokens", type=click.IntRange(16), default=96, help="For each prompt.")
@click.option("--rounds", type=click.IntRange(1), default=3)
@click.option("--quantization-encoding", "encoding", default="q8_0")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=RESULTS)
def main(
    kinds: tuple[str, ...],
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
    new_tokens: int,
    rounds: int,
    encoding: str,
    out: Path,
) -> None:
    """Prints the table; writes `adaptive.json` and `adaptive.png`."""
    console = Console(stderr=True)
    longest = max(*contexts, 2200) + new_tokens + 64
    engines = Engines(
        str(ensure_demo_model(demo_model_folder())),
        encoding,
        max(batches),
        max(batches) * (longest // PAGE + 2),
    )
    cells: dict[str, dict[str, float]] = {}
    for context in contexts:
        for kind in kinds:
            for batch in batches:
                prompts = prompts_of(kind, batch, context, engines.any.tokenizer)
                name = f"{kind}, batch {batch}, {context} tokens"
                console.print(name, soft_wrap=True)
                cells[name] = _cell(engines, prompts, new_tokens, rounds)
                console.print(
                    "  " + "  ".join(f"{who} {speed:.0f}" for who, speed in cells[name].items()),
                    soft_wrap=True,
                )
    Console(width=200).print(_table(cells))
    summary = _summary(cells)
    for line in summary:
        click.echo(line)
    out.mkdir(parents=True, exist_ok=True)
    subtitle = f"SmolLM2-135M-Instruct {encoding}, EAGLE-3, {os.cpu_count()} processors"
    names = [contender.name for contender in CONTENDERS]
    plot_cells(cells, names, subtitle=subtitle, file=out / "adaptive.png")
    written: dict[str, Any] = {"tokens_per_second": cells, "summary": summary}
    (out / "adaptive.json").write_text(json.dumps(written, indent=1))


def _cell(
    engines: Engines, prompts: list[list[int]], new_tokens: int, rounds: int
) -> dict[str, float]:
    """Tokens a second of each contender."""
    speeds: dict[str, list[float]] = {contender.name: [] for contender in CONTENDERS}
    expected: list[list[int]] | None = None
    for contender in CONTENDERS:  # reads the prompts, which stay in the cache
        decode_speed(engines.of(contender), prompts, 16)
    for _ in range(rounds):
        for contender in CONTENDERS:
            speed, answers = decode_speed(engines.of(contender), prompts, new_tokens)
            speeds[contender.name].append(speed)
            expected = expected or answers
            if answers != expected:
                raise AssertionError(f"{contender.name} answers otherwise than the target alone")
    return {name: median(found) for name, found in speeds.items()}


def _best_fixed(speeds: dict[str, float]) -> str:
    return max((one.name for one in CONTENDERS if one.is_fixed), key=lambda name: speeds[name])


def _table(cells: dict[str, dict[str, float]]) -> Table:
    """Tokens a second, the best fixed choice of a cell in bold."""
    table = Table("tokens/s", *(one.name for one in CONTENDERS), "auto / best", "auto / alone")
    for cell, speeds in cells.items():
        best = _best_fixed(speeds)
        values = [
            f"[bold]{speed:.0f}[/bold]" if name == best else f"{speed:.0f}"
            for name, speed in speeds.items()
        ]
        ratios = [speeds["auto"] / speeds[name] for name in (best, "alone")]
        table.add_row(cell, *values, *(f"{ratio:.2f}" for ratio in ratios))
    return table


def _summary(cells: dict[str, dict[str, float]]) -> list[str]:
    """The goals, and in how many cells they are met."""
    best = {cell: speeds["auto"] / speeds[_best_fixed(speeds)] for cell, speeds in cells.items()}
    alone = {cell: speeds["auto"] / speeds["alone"] for cell, speeds in cells.items()}
    lines = [
        f"auto / {name}: at least {GOAL} in {sum(r >= GOAL for r in ratios.values())} of"
        f" {len(ratios)} cells, median {median(ratios.values()):.2f}, least"
        f" {min(ratios.values()):.2f} ({min(ratios, key=lambda cell: ratios[cell])})"
        for name, ratios in (("best fixed", best), ("target alone", alone))
    ]
    for kind in ("summary", "code edit", "JSON"):
        gains = [
            max(speeds["both K=1"], speeds["both K=3"], speeds["auto"])
            / max(speeds[one.name] for one in CONTENDERS if one.engine == "draft")
            for cell, speeds in cells.items()
            if cell.startswith(kind)
        ]
        if gains:
            lines.append(f"{kind}: draft with n-grams / draft, median {median(gains):.2f}")
    return lines


if __name__ == "__main__":
    main()
