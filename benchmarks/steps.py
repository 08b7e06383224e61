"""Step times of unispec's methods relative to the target alone, in one process.

The cases take turns prompt by prompt, so that what else the machine does slows all of
them alike; `generate.py` is the benchmark for an idle machine.
"""

# ruff: noqa: E402
from __future__ import annotations

from unispec.allocator import restart_with_jemalloc
from unispec.waiting import wait_asleep

# Before MAX is imported, as the command line does.
restart_with_jemalloc()
wait_asleep()

from statistics import median, quantiles

import click
from max.pipelines.context import SamplingParams

from unispec.checkpoints.demo import demo_draft_folder, demo_model_folder, ensure_demo_model
from unispec.engine import Engine, EngineConfig, Request
from unispec.methods import Method

PROMPTS = (
    "Explain in simple terms why the sky is blue.",
    "Write a short story about a robot who learns to paint.",
    "Give me three tips for learning a new language.",
)
CASES: tuple[tuple[Method | None, int], ...] = (
    (None, 0),
    ("eagle3", 1),
    ("eagle3", 3),
    ("eagle3", 5),
    ("dflash", 5),
)


def load(model: str, method: Method | None) -> Engine:
    """An engine; its first answer loads and compiles."""
    config = EngineConfig(
        model=model,
        draft_model=None if method is None else str(demo_draft_folder(method)),
        speculative_method=method,
        num_speculative_tokens=None if method is None else 5,
        max_length=2048,
    )
    return Engine(config)


def step_times(engine: Engine, draft_tokens: int, prompt: str, new_tokens: int) -> list[float]:
    """Seconds of each decode step of one greedy answer."""
    if draft_tokens:
        engine.num_speculative_tokens = draft_tokens
    engine.reset_prefix_cache()
    token_ids = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens)
    report = engine.generate([Request(token_ids=token_ids, sampling=sampling)])
    return [step.wall_s for step in report.decode_steps]


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(min=1), default=9, help="Prompts a case.")
@click.option("--new-tokens", type=click.IntRange(min=12), default=40, help="For each prompt.")
def main(rounds: int, new_tokens: int) -> None:
    """Prints the median and the fastest tenth of the steps, and both as ratios."""
    model = str(ensure_demo_model(demo_model_folder()))
    engines = {method: load(model, method) for method in dict.fromkeys(m for m, _ in CASES)}
    times: dict[tuple[Method | None, int], list[float]] = {case: [] for case in CASES}
    for round_ in range(rounds + 1):
        for method, k in CASES:
            found = step_times(engines[method], k, PROMPTS[round_ % len(PROMPTS)], new_tokens)
            if round_:  # the first one warms up
                times[method, k] += found
    alone = times[None, 0]
    for (method, k), seconds in times.items():
        fast, alone_fast = quantiles(seconds, n=10)[0], quantiles(alone, n=10)[0]
        click.echo(
            f"{f'{method} K={k}' if method else 'target alone':14}"
            f" median {median(seconds) * 1e3:6.1f} ms ({median(seconds) / median(alone):.2f}),"
            f" fastest tenth {fast * 1e3:6.1f} ms ({fast / alone_fast:.2f})"
        )


if __name__ == "__main__":
    main()
