"""The second stage: a draft learns from what was collected."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from unispec.errors import InputError

from .collection import Collection, write_atomically
from .draft import Draft
from .seeds import seed_of
from .settings import FitSettings

__all__ = ["History", "Measure", "acceptance", "fit"]

MEASURED_ANSWERS = 24
"""How many held-out answers acceptance is measured on, at most."""

NUM_MEASURES = 10
"""How many measures a fit has, besides the one before its first step."""

SAVE_SECONDS = 60.0
"""Time between two states that a fit can be resumed from."""

WARM_UP = 0.05
"""Share of a fit in which the learning rate rises."""

CLIP = 1.0
"""Largest norm of a gradient."""


@dataclass(frozen=True)
class Measure:
    """Held-out acceptance at one moment."""

    step: int
    """How many steps of the fit were before it."""
    loss: float
    """Mean over the steps since the last measure; NaN before the first step."""
    acceptance: list[float]
    """Share of positions where proposal 1, 1 and 2, ... are right."""

    @property
    def length(self) -> float:
        """Tokens that a step of speculative decoding is expected to yield."""
        return 1 + sum(self.acceptance)


@dataclass
class History:
    """A fit so far."""

    step: int = 0
    """How many steps are done."""
    elapsed: float = 0.0
    """Seconds that they took."""
    losses: list[float] = field(default_factory=list)
    """The loss of each step."""
    measures: list[Measure] = field(default_factory=list)
    """Before the first step, then at each tenth of the fit."""


def fit(
    draft: Draft,
    collection: Collection,
    settings: FitSettings,
    state: Path,
    on_step: Callable[[History, float], None] = lambda history, progress: None,
) -> History:
    """Fits a draft, and goes on where a fit with the same state file was stopped.

    A resumed fit of so many epochs ends with the same draft as one that ran through.

    Args:
        draft: on the device that it is to be fitted on.
        state: the file to resume from, written about once a minute.
        on_step: called after each step with the history and the share that is done, 0 to 1.

    Raises:
        InputError: the state is of another draft, other data or other settings, or damaged; there
            is no room on the disk; or the loss is not finite.
    """
    optimizer = torch.optim.AdamW(
        draft.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    device = draft.head.device.type
    dtype = settings.dtype_on(device)
    identity = _identity(draft, collection, replace(settings, dtype=dtype))
    history = _restore(draft, optimizer, state, identity)
    per_epoch = math.ceil(len(collection.training) / settings.batch_size)
    total = per_epoch * settings.epochs
    started = saved = time.monotonic()
    before = history.elapsed
    if not history.measures:
        history.measures.append(Measure(0, math.nan, acceptance(draft, collection)))

    def progress() -> float:
        if settings.seconds is not None:
            return min(history.elapsed / settings.seconds, 1.0)
        return min(history.step / total, 1.0)

    while (done := progress()) < 1:
        epoch, turn = divmod(history.step, per_epoch)
        order = torch.randperm(
            len(collection.training), generator=_generator("order", settings.seed, epoch)
        )
        chosen = order[turn * settings.batch_size : (turn + 1) * settings.batch_size].tolist()
        batch = [collection.read(collection.training[index]) for index in chosen]
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(done)
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = draft.loss(batch, _generator("step", settings.seed, history.step))
        _check_finite(loss, "loss", history, settings)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(draft.parameters(), CLIP)
        _check_finite(norm, "gradient", history, settings)
        optimizer.step()
        history.losses.append(loss.item())
        history.step += 1
        history.elapsed = before + time.monotonic() - started
        finished = progress() >= 1
        if finished or int(NUM_MEASURES * progress()) > int(NUM_MEASURES * done):
            since = history.losses[history.measures[-1].step :]
            mean = sum(since) / len(since)
            found = acceptance(draft, collection)
            history.measures.append(Measure(history.step, mean, found))
        on_step(history, progress())
        if finished or time.monotonic() - saved > SAVE_SECONDS:
            _save(draft, optimizer, history, state, identity)
            saved = time.monotonic()
    return history


def acceptance(draft: Draft, collection: Collection) -> list[float]:
    """Share of positions in held-out greedy answers where proposal 1, 1 and 2, ... are right.

    An estimate of what decoding will accept: all positions have the same weight, also those at
    which no step would begin.
    """
    draft.eval()
    measured = map(collection.read, collection.held_out[:MEASURED_ANSWERS])
    right = torch.cat([draft.matches(example) for example in measured])  # [A, K]
    draft.train()
    if not len(right):
        return [0.0] * draft.num_proposals
    shares: list[float] = right.cumprod(dim=-1).float().mean(dim=0).tolist()
    return shares


def _generator(*key: object) -> torch.Generator:
    """Of one step alone, so that a resumed fit draws what it would have drawn."""
    return torch.Generator().manual_seed(seed_of(*key))


def _schedule(done: float) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    if done < WARM_UP:
        return (done + 0.01) / (WARM_UP + 0.01)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def _check_finite(value: torch.Tensor, name: str, history: History, settings: FitSettings) -> None:
    if not value.isfinite():
        raise InputError(
            f"the {name} is {value.item()} after {history.step} steps: choose a lower"
            f" learning_rate than {settings.learning_rate}"
        )


def _identity(draft: Draft, collection: Collection, settings: FitSettings) -> dict[str, str]:
    """What must not change from one part of a fit to the next, by what to call it."""
    config = json.dumps(draft.config(), sort_keys=True, default=str)
    return {
        "draft": config,
        "proposed tokens": hashlib.sha256(draft.target_ids.cpu().numpy().tobytes()).hexdigest(),
        "sequences": str(len(collection.training)),
        **{name: str(value) for name, value in asdict(settings).items()},
        **{f"data's {name}": str(value) for name, value in collection.settings.items()},
        "initial draft": draft.initial_draft,
    }


def _save(
    draft: Draft, optimizer: Any, history: History, state: Path, identity: dict[str, str]
) -> None:
    content = {
        "identity": identity,
        "draft": draft.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": history.step,
        "elapsed": history.elapsed,
        "losses": history.losses,
        "measures": [(one.step, one.loss, one.acceptance) for one in history.measures],
    }

    def write(part: Path) -> None:
        # Given a path, torch does not say that the disk is full.
        with part.open("wb") as file:
            torch.save(content, file)

    write_atomically(state, write)


def _restore(draft: Draft, optimizer: Any, state: Path, identity: dict[str, str]) -> History:
    if not state.is_file():
        return History()
    try:
        content = torch.load(state, map_location=draft.head.device, weights_only=True)
        _check_identity(dict(content["identity"]), identity, state)
        history = _history(content)
        draft.load_state_dict(content["draft"])
        optimizer.load_state_dict(content["optimizer"])
    except InputError:
        raise
    # Damaged bytes raise whatever unpickling stumbles over.
    except Exception as error:
        raise InputError(
            f"{state} is damaged ({' '.join(str(error).split())[:200]}): delete it and resume"
        ) from error
    return history


def _check_identity(found: dict[str, str], identity: dict[str, str], state: Path) -> None:
    for name, value in identity.items():
        if found.get(name) != value:
            raise InputError(
                f"{state} is of a fit with another {name} ({str(found.get(name, 'none'))[:80]}, not"
                f" {value[:80]}): give the same settings again, or another output"
            )


def _history(content: Any) -> History:
    """What was done, as `_save` wrote it.

    Raises:
        ValueError: the parts contradict each other.
    """
    history = History(
        int(content["step"]),
        float(content["elapsed"]),
        [float(loss) for loss in content["losses"]],
        [Measure(*measure) for measure in content["measures"]],
    )
    steps = [measure.step for measure in history.measures]
    if history.step != len(history.losses) or not 0 <= history.elapsed < math.inf:
        raise ValueError(
            f"{history.step} steps in {history.elapsed} s, {len(history.losses)} losses"
        )
    if not steps or steps != sorted({*steps, 0}) or steps[-1] > history.step:
        raise ValueError(f"measures after {steps} of {history.step} steps")
    return history
