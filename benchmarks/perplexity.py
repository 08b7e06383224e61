"""Perplexity of the demo model on a text, for each number format of its weights.

Three programs read the same GGUF file: unispec, llama.cpp, and transformers, which dequantises the
weights and computes in float32. The text, the beginning of Alice's Adventures in Wonderland, is cut
into windows; of each, all tokens but the first are scored after the ones before them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import click
from generation.prompts import load_tokenizer
from generation.subprocesses import Json, start
from on_cpu.contenders import System
from on_cpu.formats import FORMATS, Format
from on_cpu.gguf_files import demo_gguf
from on_cpu.interpreters import Interpreters, python_option
from on_cpu.texts import BOOK
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from unispec.checkpoints.demo import demo_model_folder, ensure_demo_model
from unispec.errors import InputError

SCORERS: dict[str, tuple[System, str]] = {
    "transformers": ("transformers", "on_cpu.transformers_scores"),
    "llama.cpp": ("llama.cpp", "on_cpu.llama_worker"),
    "unispec": ("unispec", "on_cpu.unispec_scores"),
}
"""What each program is, and the module that scores with it."""
REFERENCE = ("f32", "transformers")
PAGE = 128


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one program found for one format."""

    form: str
    program: str
    logprobs: list[list[float]]
    """Of each window."""

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log probability."""
        return math.exp(-fmean(logprob for window in self.logprobs for logprob in window))


@click.command(help=__doc__, context_settings={"max_content_width": 100, "show_default": True})
@click.option(
    "--formats",
    multiple=True,
    type=click.Choice(list(FORMATS)),
    default=("f32", "q8_0", "q4_0"),
    help="Of the weights; can be given several times.",
)
@click.option(
    "--programs",
    multiple=True,
    type=click.Choice(list(SCORERS)),
    default=list(SCORERS),
    help="Who takes part; can be given several times.",
    show_default="all",
)
@click.option("--windows", type=click.IntRange(1, 8), default=8, help="How many, of the text.")
@click.option("--window", type=click.IntRange(2, 512), default=512, help="Tokens of one.")
@click.option("--threads", type=click.IntRange(min=1), default=2, help="For each process.")
@python_option("llama", "xllamacpp")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write every log probability.",
)
def main(
    formats: tuple[str, ...],
    programs: tuple[str, ...],
    windows: int,
    window: int,
    threads: int,
    llama_python: str,
    json_file: Path | None,
) -> None:
    """Scores the text and prints the table."""
    progress = Console(stderr=True)
    interpreters = Interpreters(own=sys.executable, llama_cpp=llama_python, openvino=sys.executable)
    try:
        tokenizer = load_tokenizer(ensure_demo_model(demo_model_folder()))
        files = {form: demo_gguf(FORMATS[form]) for form in dict.fromkeys(formats)}
    except InputError as error:
        raise click.ClickException(str(error)) from error
    ids = tokenizer(BOOK.read_text(encoding="utf-8"))["input_ids"]
    texts = [ids[begin : begin + window] for begin in range(0, windows * window, window)]
    scores: list[Score] = []
    missing: list[str] = []
    for form, file in files.items():
        for program in dict.fromkeys(programs):
            progress.print(f"{FORMATS[form].label}: {program}", highlight=False)
            system, module = SCORERS[program]
            reason = interpreters.missing(system)
            if reason is None:
                job = _job(program, FORMATS[form], file, rows=windows, length=window)
                python = interpreters.of(system)
                try:
                    with start(
                        module,
                        job,
                        threads=threads,
                        python=python,
                        own_allocator=system == "llama.cpp",
                    ) as (worker, _):
                        logprobs = worker.ask({"windows": texts})["logprobs"]
                except RuntimeError as error:
                    reason = str(error).strip().splitlines()[-1]
                else:
                    scores.append(Score(form=form, program=program, logprobs=logprobs))
            if reason is not None:
                missing.append(f"{FORMATS[form].label}, {program}: {reason}")
    console = Console()
    console.print(_table(scores))
    for line in missing:
        console.print(line, highlight=False)
    if json_file is not None:
        report = [{"perplexity": score.perplexity, **asdict(score)} for score in scores]
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _job(program: str, form: Format, file: Path, *, rows: int, length: int) -> Json:
    job: Json = {"file": str(file)}
    if program == "transformers":
        return job
    job |= {"rows": rows, "max_length": length + PAGE}
    return job if program == "llama.cpp" else {**job, "encoding": form.encoding}


def _table(scores: Sequence[Score]) -> Table:
    """One row for each format and program."""
    count = sum(map(len, scores[0].logprobs)) if scores else 0
    table = Table(title=f"{count} tokens", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("weights")
    table.add_column("program")
    table.add_column("perplexity", justify="right")
    table.add_column("x transformers\nin F32", justify="right")
    table.add_column("x transformers,\nsame weights", justify="right")
    found = {(score.form, score.program): score.perplexity for score in scores}
    for score in scores:
        others = (found.get(REFERENCE), found.get((score.form, "transformers")))
        table.add_row(
            FORMATS[score.form].label,
            score.program,
            f"{score.perplexity:.3f}",
            *("-" if other is None else f"{score.perplexity / other:.4f}" for other in others),
        )
    return table


if __name__ == "__main__":
    main()
