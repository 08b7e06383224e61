"""Measures decode steps on a GPU: unispec and MAX's own unified architectures.

The shape is Llama-3.1-8B's in bfloat16, with an EAGLE draft (K = 3) and a DFlash draft (K = 7); the
weights are random and made here once, 20 GB in the cache folder. Each draft stands with a fixed
probability, as random ones never would. Contenders take turns, each in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
from generation import machine
from generation.subprocesses import run_module
from max.driver import accelerator_count
from on_gpu.contenders import CONTENDERS, Contender
from on_gpu.job import Job
from on_gpu.random_checkpoint import random_draft, random_target
from on_gpu.shapes import LLAMA_8B
from on_gpu.steps import Timed
from on_gpu.summary import summarise
from on_gpu.table import CAPTION, TABLE_WIDTH, results_table
from rich.console import Console

RESULTS = Path(__file__).resolve().parent / "results"
COPIED = 1 << 31
PAGE = 128


def driver() -> str:
    """What NVIDIA's own program says of GPU and driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown: there is no nvidia-smi"
    asked = "--query-gpu=name,driver_version,memory.total,power.limit"
    command = [program, asked, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def make_job(
    contender: Contender, *, batches: tuple[int, ...], context: int, new_tokens: int, rate: float
) -> Job:
    """What a contender loads; makes the weights where they are not there yet."""
    return Job(
        target=str(random_target(LLAMA_8B)),
        draft_folder=str(random_draft(LLAMA_8B, contender.draft)),
        method=contender.draft.method,
        draft_tokens=contender.draft.draft_tokens,
        acceptance=rate,
        devices="gpu",
        rows=max(batches),
        context=context,
        # Full pages, with room for the drafts of the last step.
        max_length=-(-(context + new_tokens + PAGE // 2) // PAGE) * PAGE,
    )


@click.command(help=__doc__, context_settings={"max_content_width": 100, "show_default": True})
@click.option(
    "--contenders",
    multiple=True,
    type=click.Choice(list(CONTENDERS)),
    default=list(CONTENDERS),
    help="Who takes part; can be given several times.",
    show_default="all",
)
@click.option(
    "--batch",
    multiple=True,
    type=click.IntRange(min=1),
    default=(1, 8, 32, 128),
    help="Prompts at a time; can be given several times.",
)
@click.option("--context", type=click.IntRange(16, 4096), default=512, help="Tokens of a prompt.")
@click.option("--new-tokens", type=click.IntRange(32, 2048), default=128, help="For each prompt.")
@click.option(
    "--acceptance",
    type=click.FloatRange(0, 1),
    default=0.7,
    help="Probability with which each draft stands, if those before it do.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=2, help="Processes a contender.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    default=RESULTS / "gpu.json",
    help="Everything that was measured.",
    show_default="benchmarks/results/gpu.json",
)
def main(
    contenders: tuple[str, ...],
    batch: tuple[int, ...],
    context: int,
    new_tokens: int,
    acceptance: float,
    rounds: int,
    json_file: Path,
) -> None:
    """Runs the benchmark, prints the table and writes the file."""
    if not accelerator_count():
        raise click.ClickException("MAX finds no GPU on this machine, and this benchmark needs one")
    progress = partial(Console(stderr=True).print, highlight=False)
    threads = len(os.sched_getaffinity(0))
    about = machine.describe() | {"driver": driver()}
    progress(f"copying {COPIED >> 20} MiB on the GPU")
    device = run_module("on_gpu.bandwidth", {"size": COPIED}, threads=threads)
    progress("making random weights, where there are none yet")
    chosen = [CONTENDERS[name] for name in dict.fromkeys(contenders)]
    batches = tuple(dict.fromkeys(batch))
    settings = {"batches": batches, "context": context, "new_tokens": new_tokens}
    jobs = {one.name: make_job(one, **settings, rate=acceptance) for one in chosen}
    measured: defaultdict[str, dict[int, list[Timed]]] = defaultdict(dict)
    failed: dict[str, str] = {}
    for turn in range(rounds):
        for one in chosen:
            if one.name in failed:
                continue
            progress(f"round {turn + 1} of {rounds}: {one.label}")
            request = {
                "system": one.system,
                "job": asdict(jobs[one.name]),
                "batches": batches,
                "new_tokens": new_tokens,
                "vocabulary": LLAMA_8B.vocabulary,
            }
            try:
                found = run_module("on_gpu.worker", request, threads=threads)
            except RuntimeError as error:
                # What the others did took long.
                failed[one.name] = str(error)
                progress(failed[one.name], markup=False)
                continue
            for rows in batches:
                measured[one.name].setdefault(rows, []).append(Timed(**found[str(rows)]))
    summaries = summarise(
        measured,
        LLAMA_8B,
        context=context + new_tokens // 2,
        copy_bytes_per_s=device["copy_bytes_per_s"],
    )
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(results_table(f"{LLAMA_8B.name}, {context} tokens of context", summaries))
    console.print(CAPTION, style="dim", highlight=False)
    copied = f"{device['copy_bytes_per_s'] / 1e9:.0f} GB/s read and written by a copy"
    console.print(f"{about['driver']}; {copied}.", style="dim", highlight=False)
    report = {
        "machine": about,
        "device": device,
        "settings": {**settings, "shape": asdict(LLAMA_8B), "acceptance": acceptance},
        "failed": failed,
        "contenders": {
            name: {
                "label": CONTENDERS[name].label,
                "summary": {rows: asdict(summaries[rows][name]) for rows in by_rows},
                "rounds": {rows: [asdict(one) for one in by_rows[rows]] for rows in by_rows},
            }
            for name, by_rows in measured.items()
        },
    }
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    progress(f"Written: {json_file}", soft_wrap=True)
    if failed:
        raise click.ClickException(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
