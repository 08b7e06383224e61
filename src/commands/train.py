"""`unispec train`: makes a draft for a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click
from click.core import ParameterSource

from unispec.commands.files import check_checkpoints
from unispec.commands.libraries import check_installed, quieten_libraries
from unispec.commands.options import FiniteRange, setting
from unispec.commands.prompts import PromptFile
from unispec.methods import Method
from unispec.training.output import check_output
from unispec.training.settings import (
    DEFAULT_LAYERS,
    CollectSettings,
    Device,
    DraftShape,
    Dtype,
    FitSettings,
)

if TYPE_CHECKING:
    from rich.console import Console

    from unispec.training import Progress, TrainedDraft

__all__ = ["train"]

NEEDED = ("torch", "matplotlib")


@click.command()
@click.option(
    "--model",
    "--model-path",
    "model",
    required=True,
    help="The target: a folder with config.json, safetensors and tokenizer, or a Hugging Face "
    "repository id.",
)
@click.option(
    "--speculative-method",
    "method",
    type=click.Choice(sorted(DEFAULT_LAYERS)),
    required=True,
    help="What kind of draft.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for the draft.",
)
@click.option(
    "--prompts",
    type=PromptFile(),
    help="A file with one prompt a line.  [default: a built-in set of 9,000, and own prompts]",
)
@click.option(
    "--own-prompts/--no-own-prompts",
    "own_prompts",
    default=None,
    help="Whether the target writes up to half of the prompts itself, which needs a chat template. "
    " [default: without --prompts, where it can]",
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the target's answers and features; what is there already is used.  "
    "[default: OUTPUT/data]",
)
@setting("--tokens", CollectSettings, "tokens", help="Collect at least so many tokens of answers.")
@click.option(
    "--minutes",
    type=FiniteRange(min=0, min_open=True),
    help="Take so long for everything, instead of --tokens and --epochs.",
)
@click.option(
    "--device",
    type=click.Choice(get_args(Device)),
    default="cpu",
    show_default=True,
    help="Where.",
)
@click.option(
    "--dtype",
    type=click.Choice(get_args(Dtype)),
    help="Of the target, and of the fit's matrix products. bfloat16 is faster where the processor "
    "has it.  [default: float32 on cpu, bfloat16 on cuda]",
)
@click.option("--resume", is_flag=True, help="Go on where an earlier run was stopped.")
@click.option(
    "--draft-model-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a draft that was trained with this command for this target and in the same "
    "shape, to begin the fit with.  [default: random weights]",
)
@setting(
    "--draft-vocab-size",
    DraftShape,
    "vocab_size",
    help="Propose only so many tokens, the most frequent ones.  [default: all]",
)
@setting(
    "--draft-layers",
    DraftShape,
    "layers",
    help="Decoder layers of the draft.  [default: "
    f"{', '.join(f'{count} for {method}' for method, count in DEFAULT_LAYERS.items())}]",
)
@setting(
    "--block-size",
    DraftShape,
    "block_size",
    help="Slots of a dflash block, one more than it proposes tokens.",
)
@setting("--epochs", FitSettings, "epochs", help="Times that every answer is learnt from.")
@setting("--batch-size", FitSettings, "batch_size", help="Answers of a step.")
@setting("--learning-rate", FitSettings, "learning_rate", help="AdamW's, at its highest.")
@setting(
    "--max-new-tokens",
    CollectSettings,
    "max_new_tokens",
    help="Longest answer that is collected.",
)
@click.option(
    "--chat-template/--no-chat-template",
    default=True,
    help="Whether prompts are posed as a user's messages.  [default: chat-template]",
)
@setting("--seed", FitSettings, "seed", help="Makes a run repeat.")
def train(
    model: str,
    method: Method,
    output: Path,
    prompts: tuple[str, ...] | None,
    own_prompts: bool | None,
    data: Path | None,
    tokens: int,
    minutes: float | None,
    device: Device,
    dtype: Dtype | None,
    resume: bool,
    draft_model_path: Path | None,
    draft_vocab_size: int | None,
    draft_layers: int | None,
    block_size: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    max_new_tokens: int,
    chat_template: bool,
    seed: int,
) -> None:
    """Train a draft for your own model.

    The target answers prompts, then a draft learns to predict such answers. Both stages can be
    killed at any moment and resumed. Needs the `train` extra: torch and matplotlib.
    """
    has_tokens = (
        click.get_current_context().get_parameter_source("tokens") is not ParameterSource.DEFAULT
    )
    if has_tokens and minutes is not None:
        raise click.UsageError("--tokens and --minutes exclude each other; give one")
    if own_prompts and not chat_template:
        raise click.UsageError(
            "--own-prompts and --no-chat-template exclude each other: a message's beginning is"
            " part of the chat template"
        )
    check_installed(*NEEDED)
    check_output(output, resume=resume)
    quieten_libraries()
    check_checkpoints(model, draft=None if draft_model_path is None else str(draft_model_path))
    import transformers
    from rich.console import Console

    from unispec.commands.bar import bars
    from unispec.training import train_draft

    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    console = Console(stderr=True)
    with bars(console) as show:
        trained = train_draft(
            model,
            DraftShape(
                method=method,
                layers=draft_layers,
                vocab_size=draft_vocab_size,
                block_size=block_size,
            ),
            output,
            prompts=prompts,
            data=data,
            initial_draft=draft_model_path,
            collecting=CollectSettings(
                tokens=tokens,
                max_new_tokens=max_new_tokens,
                chat_template=chat_template,
                own_prompts=own_prompts,
                seed=seed,
            ),
            fitting=FitSettings(
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
                dtype=dtype,
                seed=seed,
            ),
            seconds=None if minutes is None else 60 * minutes,
            device=device,
            resume=resume,
            on_progress=lambda progress: show(progress.stage, progress.done, _describe(progress)),
        )
    _report(console, trained, model, method)


def _describe(progress: Progress) -> str:
    if progress.history is None:
        return f"{progress.collection.num_answer_tokens:,} tokens"
    last = progress.history.measures[-1]
    shares = " ".join(f"{100 * share:.0f}" for share in last.acceptance)
    loss = progress.history.losses[-1]
    return f"loss {loss:.3f}  accepted {shares} %  length {last.length:.2f}"


def _report(console: Console, trained: TrainedDraft, model: str, method: str) -> None:
    first, last = trained.history.measures[0], trained.history.measures[-1]
    console.print(
        f"\nHeld-out length {first.length:.2f} before, [bold]{last.length:.2f}[/bold] now"
        f" ({last.step:,} steps). Written to {trained.folder}\n",
        highlight=False,
    )
    console.print(
        f"unispec generate --model {model} --draft-model-path {trained.folder}"
        f" --speculative-method {method} --prompt ...",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
