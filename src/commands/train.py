"""`unispec train`: makes a draft for a model."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unispec.commands.files import check_checkpoints
from unispec.commands.libraries import check_installed
from unispec.commands.options import FiniteRange
from unispec.commands.prompts import PromptFile
from unispec.errors import InputError
from unispec.methods import DRAFT_METHODS, Method

if TYPE_CHECKING:
    from rich.console import Console

    from unispec.training import Collection, CollectSettings, DraftShape, FitSettings
    from unispec.training.fitting import History

__all__ = ["train"]

DEFAULT_TOKENS = 400_000
COLLECTING = 0.4
"""Share of `--minutes` that collecting gets."""

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
    type=click.Choice(DRAFT_METHODS),
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
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    help=f"Collect at least so many tokens of answers.  [default: {DEFAULT_TOKENS:,}]",
)
@click.option(
    "--minutes",
    type=FiniteRange(min=0, min_open=True),
    help="Take so long for everything, instead of --tokens and --epochs.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
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
@click.option(
    "--draft-vocab-size",
    type=click.IntRange(min=1),
    help="Propose only so many tokens, the most frequent ones.  [default: all]",
)
@click.option(
    "--draft-layers",
    type=click.IntRange(min=1),
    help="Decoder layers of the draft.  [default: 1 for eagle, 3 for dflash]",
)
@click.option(
    "--block-size",
    type=click.IntRange(min=2, max=16),
    default=6,
    show_default=True,
    help="Slots of a dflash block, one more than it proposes tokens.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Times that every answer is learnt from.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Answers of a step.",
)
@click.option(
    "--learning-rate",
    type=FiniteRange(min=0, min_open=True),
    default=1e-3,
    show_default=True,
    help="AdamW's, at its highest.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=8),
    default=200,
    show_default=True,
    help="Longest answer that is collected.",
)
@click.option(
    "--chat-template/--no-chat-template",
    default=True,
    help="Whether prompts are posed as a user's messages.  [default: chat-template]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=0,
    show_default=True,
    help="Makes a run repeat.",
)
def train(
    model: str,
    method: Method,
    output: Path,
    prompts: tuple[str, ...] | None,
    own_prompts: bool | None,
    data: Path | None,
    tokens: int | None,
    minutes: float | None,
    device: str,
    dtype: str | None,
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

    The target answers prompts, then a draft learns to foresee such answers. Both stages can be
    killed at any moment and resumed. Needs the `train` extra: torch and matplotlib.
    """
    if tokens is not None and minutes is not None:
        raise click.UsageError("--tokens and --minutes exclude each other; give one")
    if own_prompts and not chat_template:
        raise click.UsageError(
            "--own-prompts and --no-chat-template exclude each other: a message's beginning is"
            " part of the chat template"
        )
    check_installed(*NEEDED)
    if not resume:
        _check_empty(output)
    from unispec.commands.libraries import quieten_libraries

    quieten_libraries()
    check_checkpoints(model, draft=None if draft_model_path is None else str(draft_model_path))
    import torch
    import transformers
    from rich.console import Console

    from unispec.training import CollectSettings, DraftShape, FitSettings

    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    seconds = None if minutes is None else 60 * minutes
    shape = DraftShape(
        method=method, layers=draft_layers, vocab_size=draft_vocab_size, block_size=block_size
    )
    collecting = CollectSettings(
        tokens=tokens or (None if minutes else DEFAULT_TOKENS),
        seconds=None if seconds is None else COLLECTING * seconds,
        max_new_tokens=max_new_tokens,
        chat_template=chat_template,
        own_prompts=bool(own_prompts),
        seed=seed,
    )
    fitting = FitSettings(
        epochs=epochs,
        seconds=None if seconds is None else (1 - COLLECTING) * seconds,
        batch_size=batch_size,
        learning_rate=learning_rate,
        dtype=getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16")),
        seed=seed,
    )
    _train(
        Console(stderr=True),
        model=model,
        may_write_prompts=own_prompts is None and chat_template and not prompts,
        device=device,
        prompts=prompts,
        shape=shape,
        begin_with=draft_model_path,
        collecting=collecting,
        fitting=fitting,
        output=output,
        data=data or output / "data",
    )


def _train(
    console: Console,
    *,
    model: str,
    may_write_prompts: bool,
    device: str,
    prompts: tuple[str, ...] | None,
    shape: DraftShape,
    begin_with: Path | None,
    collecting: CollectSettings,
    fitting: FitSettings,
    output: Path,
    data: Path,
) -> None:
    import torch

    from unispec.commands.bar import bar
    from unispec.engine import Engine, EngineConfig
    from unispec.training import TorchTarget, collect, fit, make_draft, publish
    from unispec.training.collecting import encode, num_own_prompts
    from unispec.training.collection import make_folder, read_num_shards, write_whole
    from unispec.training.methods import check_beginning
    from unispec.training.own_prompts import message_marks
    from unispec.training.prompts import built_in_prompts

    # Refuses now what `unispec generate` would refuse in the end.
    Engine(EngineConfig(model=model))
    target = TorchTarget(model, device, fitting.dtype)
    shape.check(target.config)
    if begin_with is not None:
        check_beginning(target.config, shape, begin_with)
    collecting = replace(collecting, layers=shape.tapped_layers(target.config))
    questions = list(prompts) if prompts else built_in_prompts()
    encode(target, questions[:2], collecting.chat_template)
    try:
        if may_write_prompts or collecting.own_prompts:
            message_marks(target)
            collecting = replace(collecting, own_prompts=True)
    except InputError as error:
        if collecting.own_prompts:
            raise
        console.print(f"Only the built-in prompts are posed. {error}", markup=False)
    working = output / "training"
    make_folder(working)
    # Says that collecting is over, and with how many shards: a data folder may grow for others.
    over, begin = working / "collected.json", time.monotonic()
    try:
        with bar(console, "collecting", "{tokens:,} tokens") as show:
            collection = collect(
                target,
                questions,
                collecting,
                data,
                shards=read_num_shards(over) if over.exists() else None,
                on_shard=lambda found: show(
                    _share(found, collecting, time.monotonic() - begin),
                    tokens=found.num_answer_tokens,
                ),
            )
        ended = json.dumps({"shards": collection.num_shards})
        write_whole(over, lambda part: part.write_text(ended))
        draft = make_draft(target, collection, shape, fitting.seed, begin_with).to(target.device)
        with bar(console, "fitting", "{state}") as show:
            history = fit(
                draft,
                collection,
                fitting,
                working / "state.pt",
                lambda so_far, done: show(done, state=_describe(so_far)),
            )
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the memory of {device} is full: use a lower --max-new-tokens or --batch-size, shorter"
            " prompts or --device cpu"
        ) from error
    settings: dict[str, Any] = {
        "model": model,
        "method": shape.method,
        "began with": draft.began_with,
        "draft layers": draft.config()["num_hidden_layers"],
        "draft vocabulary": len(draft.target_ids),
        "prompts": f"{len(prompts)} of a file" if prompts else "the built-in ones",
        "own prompts": num_own_prompts(collection, questions),
        "answers": f"up to {collecting.max_new_tokens} tokens, temperatures 0, 0.7 and 1",
        "answer tokens": collection.num_answer_tokens,
        "sequences": len(collection.training),
        "held-out sequences": len(collection.held_out),
        "steps": history.step,
        "sequences a step": fitting.batch_size,
        "learning rate": fitting.learning_rate,
        "seed": fitting.seed,
        "device": device,
        "dtype": str(fitting.dtype).removeprefix("torch."),
        "seconds of the fit": round(history.elapsed),
    }
    if shape.method == "dflash":
        settings["block size"] = shape.block_size
    publish(draft, history, settings, output)
    _report(console, history, output, model, shape.method)


def _check_empty(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output} is not empty; give --resume, or another --output")


def _share(found: Collection, settings: CollectSettings, elapsed: float) -> float:
    """How much is collected, 0 to 1."""
    if settings.tokens is not None:
        return min(found.num_answer_tokens / settings.tokens, 1.0)
    assert settings.seconds is not None
    return min(elapsed / settings.seconds, 1.0)


def _describe(history: History) -> str:
    last = history.measures[-1]
    shares = " ".join(f"{100 * share:.0f}" for share in last.acceptance)
    return f"loss {history.losses[-1]:.3f}  accepted {shares} %  length {last.length:.2f}"


def _report(console: Console, history: History, output: Path, model: str, method: str) -> None:
    first, last = history.measures[0], history.measures[-1]
    console.print(
        f"\nHeld-out length {first.length:.2f} before, [bold]{last.length:.2f}[/bold] now"
        f" ({last.step:,} steps). Written to {output}\n",
        highlight=False,
    )
    console.print(
        f"unispec generate --model {model} --draft-model-path {output}"
        f" --speculative-method {method} --prompt ...",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
