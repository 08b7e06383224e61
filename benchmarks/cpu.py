"""Measures greedy generation on a CPU, for each number format of the weights.

unispec, alone and with its drafts, and llama.cpp read the same GGUF file; OpenVINO GenAI does where
it can, MAX's own pipeline and transformers take part in float32. Each contender has a process of
its own, the same processors and as many threads. All answer a batch in turn, then the next one, so
that what else the machine does slows all of them alike.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
from generation import machine
from on_cpu.budget import Budget
from on_cpu.contenders import CONTENDERS
from on_cpu.formats import FORMATS
from on_cpu.gguf_writing import weight_bytes
from on_cpu.interpreters import Interpreters, python_option
from on_cpu.jobs import jobs
from on_cpu.measurement import Cell, Measurement
from on_cpu.models import DEFAULT_FORMATS, DEMO, find_model, load_texts, who_runs
from on_cpu.plot import plot_results
from on_cpu.random_gguf import SHAPES
from on_cpu.reading import reading_gb_per_s
from on_cpu.report import format_report
from on_cpu.summary import Summary, summarise
from on_cpu.table import CAPTION, TABLE_WIDTH, decode_table, prefill_table
from rich.console import Console

from unispec.errors import InputError

RESULTS = Path(__file__).resolve().parent / "results"
PREFILLS = (38, 512)
QUIET_LOAD = 1.5
PAGE = 128
QUICK = {"batch": (1,), "context": (100,), "rounds": 2}


def _quick(context: click.Context, option: click.Parameter, chosen: bool) -> None:
    """Lowers the defaults, so that an option that is given still counts."""
    if chosen:
        context.default_map = QUICK


@click.command(help=__doc__, context_settings={"max_content_width": 100, "show_default": True})
@click.option(
    "--shape",
    type=click.Choice([DEMO, *SHAPES]),
    default=DEMO,
    help="The demo model, or random weights of another shape, which run without drafts.",
)
@click.option(
    "--formats",
    multiple=True,
    type=click.Choice(list(FORMATS)),
    show_default="; ".join(f"{shape}: {', '.join(f)}" for shape, f in DEFAULT_FORMATS.items()),
    help="Of the weights; can be given several times.",
)
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
    default=(1, 4),
    help="Prompts at a time; can be given several times.",
)
@click.option(
    "--context",
    multiple=True,
    type=click.IntRange(min=1, max=4000),
    default=(100, 2000),
    help="About how many tokens a prompt has; up to 128, the chat prompts as they are.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="At most, for each cell.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=64, help="For each prompt.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0),
    default=12.0,
    help="For all rounds; what takes longer than its share gets fewer. Loading comes on top.",
)
@click.option("--threads", type=click.IntRange(min=1), default=2, help="For each process.")
@python_option("llama", "xllamacpp")
@click.option(
    "--llama-server",
    type=click.Path(exists=True, dir_okay=False),
    envvar="UNISPEC_LLAMA_SERVER",
    help="llama.cpp's server instead of xllamacpp, such as one that is built for this processor.",
)
@python_option("openvino", "openvino-genai")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    default=RESULTS / "cpu.json",
    help="Everything that was measured.",
    show_default="benchmarks/results/cpu.json",
)
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(dir_okay=False, path_type=Path),
    default=RESULTS / "cpu.png",
    help="A picture of it.",
    show_default="benchmarks/results/cpu.png",
)
@click.option(
    "--quick",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_quick,
    help="One prompt of a short context at a time, 2 rounds.",
)
def main(
    shape: str,
    formats: tuple[str, ...],
    contenders: tuple[str, ...],
    batch: tuple[int, ...],
    context: tuple[int, ...],
    rounds: int,
    new_tokens: int,
    minutes: float,
    threads: int,
    llama_python: str,
    llama_server: str | None,
    openvino_python: str,
    json_file: Path,
    plot_file: Path,
) -> None:
    """Runs the benchmark, prints the tables and writes the files."""
    progress = Console(stderr=True)
    about = machine.describe()
    load = machine.load_average()
    if load > QUIET_LOAD:
        progress.print(f"The machine is busy (load {load:.1f}): expect noise.")
    chosen = [FORMATS[name] for name in dict.fromkeys(formats or DEFAULT_FORMATS[shape])]
    cells = [Cell(rows, length) for length in context for rows in batch]
    budget = Budget(60 * minutes, len(chosen) * (len(cells) + len(PREFILLS)))
    # Full pages of the cache, with room for the template of a chat.
    max_length = -(-(max(*context, *PREFILLS) + new_tokens + PAGE) // PAGE) * PAGE
    interpreters = Interpreters(
        own=sys.executable,
        llama_cpp=llama_python,
        openvino=openvino_python,
        llama_server=llama_server,
    )
    try:
        texts = load_texts(shape)
        models = [find_model(shape, form) for form in chosen]
    except InputError as error:
        raise click.ClickException(str(error)) from error
    reading = reading_gb_per_s(threads)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    reports: dict[str, Any] = {}
    summaries: dict[str, dict[Cell, dict[str, Summary]]] = {}
    programs: dict[str, None] = {}
    for model in models:
        label = model.form.label
        who = who_runs([CONTENDERS[name] for name in dict.fromkeys(contenders)], model)
        told = jobs(who, model, max(batch), max_length, llama_server)
        measured = Measurement(
            contenders=who,
            jobs=told,
            interpreters=interpreters,
            texts=texts,
            cells=cells,
            prefills=PREFILLS,
            max_new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            budget=budget,
            on_progress=partial(progress.print, f"{label}:", highlight=False),
        ).run()
        size = weight_bytes(model.file)
        found = {cell: summarise(cell, given, size) for cell, given in measured.answers.items()}
        summaries[label] = found
        reports[model.form.name] = format_report(measured, found, size)
        programs |= dict.fromkeys(measured.about.values())
        title = f"{shape} in {label}, {size / 1e6:.0f} MB of weights"
        console.print(decode_table(title, found, reading))
        console.print(prefill_table(measured.prefill_s))
        for name, reason in measured.missing.items():
            console.print(f"{CONTENDERS[name].label}: {reason}", highlight=False)
    for line in (CAPTION, f"Plain reading: {reading:.1f} GB/s.", *filter(None, programs)):
        console.print(line, style="dim", highlight=False)
    report = {
        "machine": about,
        "reading_gb_per_s": reading,
        "settings": {
            "shape": shape,
            "new_tokens": new_tokens,
            "rounds": rounds,
            "minutes": minutes,
            "threads": threads,
            "max_length": max_length,
        },
        "formats": reports,
    }
    for file in (json_file, plot_file):
        file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot_results(
        summaries,
        title=f"Greedy decoding on a CPU: {shape}",
        subtitle=f"{about['processor']}, {threads} threads; {new_tokens} new tokens for each"
        " prompt, prefill excluded; median of the rounds, whiskers around the middle half;"
        " x: to llama.cpp alone",
        file=plot_file,
    )
    progress.print(f"Written: {json_file}, {plot_file}", soft_wrap=True)


if __name__ == "__main__":
    main()
