"""Decode steps of the target alone and with a draft, by the length of the context, on a CPU.

Both are engines of one process and take turns prompt by prompt, so that what else the machine does
slows them alike. A step with a draft verifies K tokens beside the one that is new, and proposes K.
"""

# ruff: noqa: E402
from __future__ import annotations

from unispec.allocator import restart_with_jemalloc
from unispec.waiting import wait_asleep

# Before MAX is imported, as the command line does.
restart_with_jemalloc()
wait_asleep()

from dataclasses import replace
from statistics import mean, median, quantiles

import click
from max.pipelines.context import SamplingParams
from on_cpu.formats import FORMATS
from on_cpu.models import DEMO, find_model, load_texts

from unispec.checkpoints.demo import DEMO_METHODS, demo_draft_folder
from unispec.engine import Engine, EngineConfig, Request
from unispec.methods import Method

PAGE = 128


def load(form: str, max_length: int, method: Method | None, k: int) -> Engine:
    """An engine that is compiled."""
    model = find_model(DEMO, FORMATS[form])
    config = EngineConfig(
        model=str(model.file),
        quantization_encoding=model.form.encoding,
        max_length=max_length,
    )
    if method is not None:
        config = replace(
            config,
            draft_model=str(demo_draft_folder(method)),
            speculative_method=method,
            num_speculative_tokens=k,
        )
    engine = Engine(config)
    engine.load()
    return engine


def milliseconds(seconds: list[float]) -> tuple[float, float]:
    """The end of the fastest tenth, which other work disturbs least, and the median."""
    return 1e3 * quantiles(seconds, n=10)[0], 1e3 * median(seconds)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--format", "form", type=click.Choice(list(FORMATS)), default="q8_0")
@click.option(
    "--context",
    multiple=True,
    type=click.IntRange(min=1, max=8000),
    default=(100, 1000, 3000),
    help="About how many tokens a prompt has; can be given several times.",
)
@click.option("--method", type=click.Choice(DEMO_METHODS), default="eagle3", help="Of the draft.")
@click.option("--k", type=click.IntRange(1, 8), default=1, help="Draft tokens a step.")
@click.option("--rounds", type=click.IntRange(min=1), default=4, help="Prompts a context.")
@click.option("--new-tokens", type=click.IntRange(min=8), default=64, help="For each prompt.")
def main(
    form: str, context: tuple[int, ...], method: Method, k: int, rounds: int, new_tokens: int
) -> None:
    """Prints the steps' times, their ratios and the tokens of a step, for each context."""
    texts = load_texts(DEMO)
    max_length = -(-(max(context) + new_tokens + PAGE) // PAGE) * PAGE
    engines = [load(form, max_length, None, 0), load(form, max_length, method, k)]
    sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens)
    click.echo(f"{form}: ms a step, end of the fastest tenth (median)")
    for length in context:
        steps: list[list[float]] = [[], []]
        accepted = []
        for turn in range(rounds + 1):
            (prompt,) = texts.batch(length, 1, turn)
            for engine, seconds in zip(engines, steps, strict=True):
                engine.reset_prefix_cache()
                report = engine.generate([Request(token_ids=prompt, sampling=sampling)])
                if turn:  # the first one warms up
                    seconds += [step.wall_s for step in report.decode_steps]
            accepted.append(report.mean_acceptance_length)
        (fast, middle), (fast_draft, middle_draft) = map(milliseconds, steps)
        click.echo(
            f"{length:5} tokens: alone {fast:6.2f} ({middle:6.2f}), {method} K={k}"
            f" {fast_draft:6.2f} ({middle_draft:6.2f}), ratio {fast_draft / fast:.3f}"
            f" ({middle_draft / middle:.3f}), {mean(accepted[1:]):.2f} tokens a step"
        )


if __name__ == "__main__":
    main()
