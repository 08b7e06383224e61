"""How often drafts are accepted on prompts that none of them was trained on.

Each draft answers the same 32 prompts greedily, at each number of drafted tokens.
"""

from __future__ import annotations

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
def main(
    drafts: tuple[str, ...],
    method: Method,
    model: str | None,
    numbers: tuple[int, ...],
    new_tokens: int,
) -> None:
    """Prints each draft's mean acceptance length and acceptance per position."""
    for draft in drafts:
        engine = Engine(
            EngineConfig(
                model=model or str(ensure_demo_model(demo_model_folder())),
                draft_model=draft,
                speculative_method=method,
                num_speculative_tokens=5,
                max_batch_size=8,
                max_length=2048,
            )
        )
        sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens)
        requests = [
            Request(
                token_ids=encode_message(engine.tokenizer, prompt),
                sampling=sampling,
            )
            for prompt in PROMPTS
        ]
        for k in numbers:
            engine.num_speculative_tokens = k
            report = engine.generate(requests)
            shares = "  ".join(f"{share:.3f}" for share in report.acceptance_per_position)
            click.echo(f"{draft}  K={k}  length {report.mean_acceptance_length:.3f}  {shares}")


if __name__ == "__main__":
    main()
