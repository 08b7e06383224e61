"""Measures greedy generation: unispec, MAX's own pipeline and Hugging Face transformers.

Same prompts, same weights (the demo model in float32), one request at a time; each contender
in a process of its own, on the same processors and with as many threads. All answer a prompt in
turn, then the next one, so that what else the machine does slows all of them alike.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click
from generation import machine
from generation.benchmark import Benchmark
from generation.contenders import CONTENDERS
from generation.plot import plot_results
from generation.prompts import encode, load_prompts, load_tokenizer
from generation.summary import summarise
from generation.table import TABLE_WIDTH, results_table
from rich.console import Console

from unispec.checkpoints.demo import demo_model_folder, ensure_demo_model
from unispec.errors import InputError

FOLDER = Path(__file__).resolve().parent
WARM_UP = "Write a poem about a harbour at night."
MAX_LENGTH = 2048
QUIET_LOAD = 1.5
QUICK = {"prompts": 2, "max_new_tokens": 24, "repeats": 1, "memory_tokens": 240}


def _quick(context: click.Context, option: click.Parameter, chosen: bool) -> None:
    """Lowers the defaults, so that an option that is given still counts."""
    if chosen:
        context.default_map = QUICK


@click.command(help=__doc__, context_settings={"max_content_width": 100, "show_default": True})
@click.option("--prompts", type=click.IntRange(min=1), default=8, help="How many, of both kinds.")
@click.option("--max-new-tokens", type=click.IntRange(min=2), default=96, help="For each prompt.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, help="Processes a contender.")
@click.option(
    "--methods",
    multiple=True,
    type=click.Choice(list(CONTENDERS)),
    default=list(CONTENDERS),
    help="Who takes part; can be given several times.",
    show_default="all",
)
@click.option("--threads", type=click.IntRange(min=1), default=2, help="For each process.")
@click.option(
    "--memory-tokens",
    type=click.IntRange(min=240, max=MAX_LENGTH // 2),
    default=800,
    help="Length of the answer over which the host's memory is watched.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=FOLDER / "results",
    help="Folder of generate.json and generate.png.",
    show_default="benchmarks/results",
)
@click.option(
    "--quick",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_quick,
    help=f"A smoke test: {', '.join(f'{name} {value}' for name, value in QUICK.items())}.",
)
def main(
    prompts: int,
    max_new_tokens: int,
    repeats: int,
    methods: tuple[str, ...],
    threads: int,
    memory_tokens: int,
    out: Path,
) -> None:
    """Runs the benchmark, prints the table and writes the files."""
    progress = Console(stderr=True)
    about = machine.describe()
    load = machine.load_average()
    if load > QUIET_LOAD:
        progress.print(f"The machine is busy (load {load:.1f}): expect noise.")
    try:
        model = ensure_demo_model(demo_model_folder())
    except InputError as error:
        raise click.ClickException(str(error)) from error
    tokenizer = load_tokenizer(model)
    asked = load_prompts(FOLDER / "prompts.txt", tokenizer)
    if prompts > len(asked):
        raise click.UsageError(f"--prompts {prompts}: prompts.txt has {len(asked)}")
    benchmark = Benchmark(
        model=model,
        contenders=[CONTENDERS[name] for name in dict.fromkeys(methods)],
        prompts=asked[:prompts],
        warm_up_prompt=encode(tokenizer, WARM_UP),
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        threads=threads,
        max_length=MAX_LENGTH,
        on_progress=lambda phase: progress.print(phase, highlight=False),
    )
    benchmark.prepare()
    runs, answers = benchmark.measure()
    judgements = benchmark.judge(answers)
    host_memory = benchmark.host_memory(memory_tokens)
    summaries = summarise(runs, [prompt.kind for prompt in benchmark.prompts])

    out.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": about,
        "settings": {
            "max_new_tokens": max_new_tokens,
            "repeats": repeats,
            "threads": threads,
            "max_length": MAX_LENGTH,
        },
        "prompts": [
            {"kind": prompt.kind, "text": prompt.text, "tokens": len(prompt.token_ids)}
            for prompt in benchmark.prompts
        ],
        "contenders": {
            name: {
                "label": CONTENDERS[name].label,
                "summary": asdict(summary),
                "answers": asdict(judgements[name]),
                "runs": [asdict(run) for run in runs[name]],
            }
            for name, summary in summaries.items()
        },
        "host_memory": host_memory,
    }
    (out / "generate.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    subtitle = (
        f"{about['processor']}, {threads} threads; {prompts} prompts, up to {max_new_tokens} new"
        f" tokens each, prefill excluded; median of {repeats} x {prompts} answers, whiskers around"
        " the middle half"
    )
    plot_results(summaries, subtitle=subtitle, file=out / "generate.png")
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(results_table(summaries, judgements))
    progress.print(f"Written: {out / 'generate.json'}, {out / 'generate.png'}", soft_wrap=True)
    wrong = {name: found.wrong for name, found in judgements.items() if found.wrong}
    if wrong:
        progress.print(f"Not what the target alone writes: {wrong}", style="bold red")
        sys.exit(1)


if __name__ == "__main__":
    main()
