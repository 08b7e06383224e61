"""`unispec generate`: answers prompts on this machine."""

from __future__ import annotations

import sys
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import click

from unispec.commands.constraint import ConstraintOptions, constraint_options
from unispec.commands.files import check_checkpoints
from unispec.commands.libraries import quieten_libraries
from unispec.commands.model import ModelOptions, compiled_option, model_options
from unispec.commands.prompts import PromptOptions, prompt_options
from unispec.commands.sampling import SamplingOptions, sampling_options
from unispec.sampling.ranges import LOGPROBS
from unispec.waiting import wait_asleep

__all__ = ["generate"]


@click.command()
@prompt_options
@model_options
@compiled_option
@sampling_options
@constraint_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option(
    "--logprobs",
    type=click.IntRange(int(LOGPROBS.low), int(LOGPROBS.high)),
    help="With --json: the log probability of each token, and of this many of the most probable "
    "ones, before penalties, grammar and sampling.",
)
def generate(
    prompts: PromptOptions,
    model: ModelOptions,
    compiled: Path | None,
    sampling: SamplingOptions,
    constraint: ConstraintOptions,
    as_json: bool,
    logprobs: int | None,
) -> None:
    """Generate text, several tokens a step where a draft is given.

    A draft changes the speed only: the output is what the target alone would write. Text goes
    to stdout as it is accepted; progress and a final table of numbers go to stderr.
    """
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs is given, but only --json prints them; give --json too")
    quieten_libraries()
    prompts.check_images()
    check_checkpoints(
        model.model,
        weight_path=model.weight_path,
        draft=model.draft,
        method=model.speculative_method,
    )
    from rich.console import Console

    from unispec.commands.console import Answers, progress, summary
    from unispec.commands.report import to_json

    texts = prompts.texts
    terminal = Console(stderr=True)
    answers = Answers(texts, sys.stdout)
    # Whatever a library prints must not mix with the output.
    with redirect_stdout(sys.stderr), ExitStack() as waiting:
        phase = waiting.enter_context(progress(terminal))

        def stream(index: int, text: str) -> None:
            waiting.close()
            answers.add(index, text)

        if model.devices == "cpu":
            wait_asleep()
        phase("starting MAX")
        from unispec.checkpoints.generation_config import read_generation_config
        from unispec.engine import Engine, Request

        engine = Engine(model.engine_config(len(texts), compiled), on_progress=phase)
        if prompts.image and not engine.reads_images:
            raise click.UsageError(
                f"--image is given, but {model.model} reads no images; leave it out"
            )
        generation_config = read_generation_config(model.model)
        grammar = constraint.grammar()
        requests = [
            Request(
                token_ids=prompts.encode(text, engine.tokenizer),
                sampling=sampling.params(generation_config),
                grammar=grammar,
                images=prompts.image,
                logprobs=logprobs,
            )
            for text in texts
        ]
        phase("generating")
        report = (
            engine.generate(requests)
            if as_json
            else engine.generate(requests, on_text=stream, on_finish=answers.finish)
        )

    if as_json:
        click.echo(to_json(texts, report))
    else:
        terminal.print("", summary(report), sep="\n")
