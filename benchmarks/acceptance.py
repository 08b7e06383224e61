"""How often drafts are accepted on prompts that none of them was trained on.

Each draft answers the same 32 prompts greedily, at each number of drafted tokens. Tokens per second
are those of all rows together, prompts included.
"""

# ruff: noqa: E402
from __future__ import annotations

from unispec.waiting import wait_asleep

wait_asleep()  # before MAX is imported, as the command line does

from pathlib import Path

import click
from max.pipelines.context import SamplingParams

from unispec.chat import encode_message
from unispec.checkpoints.demo import demo_model_folder, ensure_demo_model
from unispec.engine import Engine, EngineConfig, Request
from unispec.methods import DRAFT_METHODS, Method

PROMPTS = Path(__file__).with_name("unseen_prompts.txt").read_text(encoding="utf-8").splitlines()


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("drafts", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--speculative-method", "method", type=click.Choice(DRAFT_METHODS), required=True)
@click.option("--model", help="The target.  [default: the demo's]")
@click.option(
    "--k",
    "numbers",
    multiple=True,
    type=click.IntRange(1, 5),
    default=[1, 3, 5],
    help="Drafted tokens; repeatable.",
)
@click.option("--new-tokens", type=click.IntRange(min=2), default=96, help="For each prompt.")
@click.option("--rows", type=click.IntRange(min=1), default=8, help="Prompts at a time.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, help="Of all drafts in turn.")
def main(
    drafts: tuple[str, ...],
    method: Method,
    model: str | None,
    numbers: tuple[int, ...],
    new_tokens: int,
    rows: int,
    rounds: int,
) -> None:
    """Prints each draft's mean acceptance length, acceptance per position and speed."""
    engines = {
        draft: Engine(
            EngineConfig(
                model=model or str(ensure_demo_model(demo_model_folder())),
                draft_model=draft,
                speculative_method=method,
                num_speculative_tokens=5,
                max_batch_size=rows,
                max_length=2048,
            )
        )
        for draft in drafts
    }
    sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens)
    for draft, engine in [*engines.items()] * rounds:
        requests = [
            Request(token_ids=encode_message(engine.tokenizer, prompt), sampling=sampling)
            for prompt in PROMPTS
        ]
        for k in numbers:
            engine.num_speculative_tokens = k
            engine.reset_prefix_cache()
            report = engine.generate(requests)
            shares = "  ".join(f"{share:.3f}" for share in report.acceptance_per_position)
            speed = f"{report.tokens_per_second:.1f} tokens/s"
            length = f"length {report.mean_acceptance_length:.3f}"
            click.echo(f"{draft}  K={k}  {length}  {shares}  {speed}")


if __name__ == "__main__":
    main()
