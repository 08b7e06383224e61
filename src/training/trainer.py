"""A whole training: from a target to the checkpoint of a draft for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch

from unispec.engine import Engine, EngineConfig
from unispec.errors import InputError

from .building import check_initial_draft, make_draft
from .collecting import collect, num_own_prompts
from .collection import Collection, make_folder, read_num_shards, write_atomically
from .draft import Draft
from .fitting import History, fit
from .output import check_output
from .prompts import check_prompts
from .publishing import publish
from .settings import (
    SECONDS,
    SWITCH,
    CollectSettings,
    Device,
    DraftShape,
    FitSettings,
    check,
    shortened,
)
from .target import TorchTarget

__all__ = ["Progress", "TrainedDraft", "train_draft"]

_COLLECTING_SHARE: Final = 0.4
"""Share of a training's time that collecting gets."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a training is."""

    stage: Literal["collecting", "fitting"]
    """What is going on."""
    done: float
    """Share of the stage that is done, 0 to 1."""
    collection: Collection
    """The answers so far."""
    history: History | None = None
    """The fit so far; None before the first step."""


@dataclass(frozen=True, kw_only=True)
class TrainedDraft:
    """What a training made."""

    folder: Path
    """The checkpoint, which `EngineConfig.draft_model` takes."""
    history: History
    """Losses and held-out acceptance of the fit."""


def train_draft(
    model: str,
    shape: DraftShape,
    output: Path | str,
    *,
    prompts: Sequence[str] | None = None,
    data: Path | str | None = None,
    initial_draft: Path | str | None = None,
    collecting: CollectSettings | None = None,
    fitting: FitSettings | None = None,
    seconds: float | None = None,
    device: Device = "cpu",
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainedDraft:
    """Trains a draft: the target answers prompts, then the draft learns to predict such answers.

    Args:
        model: the target, a folder or a Hugging Face repository id.
        output: folder for the checkpoint, its card and what a resumed training needs.
        prompts: at least two; None takes about 9,000 built-in ones.
        data: folder for the target's answers and features, which other trainings may share; None:
            `data` in `output`.
        initial_draft: folder of a draft of the same shape for the same target, whose weights the
            fit starts from; None: random weights.
        collecting: what to collect; None takes the defaults. Its `layers` are replaced by those
            that the draft reads.
        fitting: how to fit; None takes the defaults.
        seconds: time for both stages together, which then end neither by tokens nor by epochs.
        resume: whether `output` may hold a training that was stopped, which then goes on.
        on_progress: called after each batch of answers and after each step of the fit.

    Raises:
        InputError: a model, draft, folder or setting that cannot be used, a full disk or a full
            memory.
    """
    output = _path("output", output)
    data = output / "data" if data is None else _path("data", data)
    initial_draft = None if initial_draft is None else _path("initial_draft", initial_draft)
    _check_types(shape, collecting, fitting, on_progress)
    check("resume", resume, SWITCH)
    if seconds is not None:
        check("seconds", seconds, SECONDS)
    check_prompts(prompts)
    check_output(output, resume=resume)
    report = on_progress or (lambda progress: None)
    collecting, fitting = collecting or CollectSettings(), fitting or FitSettings()
    if seconds is not None:
        time_to_collect = _COLLECTING_SHARE * seconds
        collecting = replace(collecting, tokens=None, seconds=time_to_collect)
        fitting = replace(fitting, seconds=seconds - time_to_collect)
    # Refuses now what `unispec generate` would refuse in the end.
    Engine(EngineConfig(model=model))
    target = TorchTarget(model, device, fitting.dtype_on(device))
    shape.check(target.config)
    if initial_draft is not None:
        check_initial_draft(target.config, shape, initial_draft)
    collecting = replace(collecting, layers=shape.tapped_layers(target.config))
    working = output / "training"
    try:
        collection = _collect(
            target,
            prompts,
            collecting,
            data,
            working / "collected.json",
            report,
        )
        draft = make_draft(target, collection, shape, fitting.seed, initial_draft)
        history = fit(
            draft.to(target.device),
            collection,
            fitting,
            working / "state.pt",
            lambda history, done: report(
                Progress(stage="fitting", done=done, collection=collection, history=history)
            ),
        )
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the memory of {device} is full: use a lower max_new_tokens or batch_size, shorter"
            " prompts or device 'cpu'"
        ) from error
    card = _card(target, shape, prompts, collecting, fitting, collection, draft, history)
    publish(draft, history, card, output)
    return TrainedDraft(folder=output, history=history)


def _path(name: str, value: object) -> Path:
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise InputError(f"{name} is {shortened(value)}: give a path")
    return Path(value)


def _check_types(shape: object, collecting: object, fitting: object, on_progress: object) -> None:
    for name, value, kind in (
        ("shape", shape, DraftShape),
        ("collecting", collecting, CollectSettings),
        ("fitting", fitting, FitSettings),
    ):
        if not isinstance(value, kind) and (value is not None or kind is DraftShape):
            raise InputError(f"{name} is {shortened(value)}: give {kind.__name__}(...)")
    if on_progress is not None and not callable(on_progress):
        raise InputError(f"on_progress is {shortened(on_progress)}: give a function")


def _collect(
    target: TorchTarget,
    prompts: Sequence[str] | None,
    settings: CollectSettings,
    data: Path,
    ended: Path,
    on_progress: Callable[[Progress], None],
) -> Collection:
    """Collects unless the file `ended` says with how many shards that was done.

    More may lie there: a data folder may grow for other trainings.
    """
    start = time.monotonic()

    def report(collection: Collection) -> None:
        done = _share(collection, settings, time.monotonic() - start)
        on_progress(Progress(stage="collecting", done=done, collection=collection))

    shards = read_num_shards(ended) if ended.exists() else None
    collection = collect(target, prompts, settings, data, shards=shards, on_shard=report)
    content = json.dumps({"shards": collection.num_shards})
    make_folder(ended.parent)
    write_atomically(ended, lambda part: part.write_text(content))
    return collection


def _share(collection: Collection, settings: CollectSettings, elapsed: float) -> float:
    """How much is collected, 0 to 1."""
    shares = []
    if settings.tokens is not None:
        shares.append(collection.num_answer_tokens / settings.tokens)
    if settings.seconds is not None:
        shares.append(elapsed / settings.seconds)
    return min(max(shares), 1.0)


def _card(
    target: TorchTarget,
    shape: DraftShape,
    prompts: Sequence[str] | None,
    collecting: CollectSettings,
    fitting: FitSettings,
    collection: Collection,
    draft: Draft,
    history: History,
) -> dict[str, Any]:
    """The settings that the checkpoint's card lists."""
    settings: dict[str, Any] = {
        "model": target.name,
        "method": shape.method,
        "initial draft": draft.initial_draft,
        "draft layers": draft.config()["num_hidden_layers"],
        "draft vocabulary": len(draft.target_ids),
        "prompts": "the built-in ones" if prompts is None else f"a list of {len(prompts)}",
        "own prompts": num_own_prompts(collection, prompts),
        "answers": f"up to {collecting.max_new_tokens} tokens, temperatures 0, 0.7 and 1",
        "answer tokens": collection.num_answer_tokens,
        "sequences": len(collection.training),
        "held-out sequences": len(collection.held_out),
        "steps": history.step,
        "sequences a step": fitting.batch_size,
        "learning rate": fitting.learning_rate,
        "seed": fitting.seed,
        "device": target.device.type,
        "dtype": fitting.dtype_on(target.device.type),
        "seconds of the fit": round(history.elapsed),
    }
    if shape.method == "dflash":
        settings["block size"] = shape.block_size
    return settings
