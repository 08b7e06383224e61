"""The trained draft as a checkpoint that `unispec generate` loads, with a card and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save

from .collection import write_atomically
from .draft import Draft
from .fitting import History
from .plot import plot

__all__ = ["publish"]

_KINDS = {"eagle": "An EAGLE", "eagle3": "An EAGLE-3", "dflash": "A DFlash"}

_CARD = """---
base_model: {model}
library_name: unispec
tags: [speculative-decoding, {method}]
---

# A draft for {model}

{kind} draft. It makes `{model}` answer faster and changes no word of what it says:

    unispec generate --model {model} --draft-model-path {folder} \\
      --speculative-method {method} --prompt "..."

## Held-out acceptance

On greedy answers of the target to prompts that this fit did not learn from; a proposal counts if
it and those before it are right. All positions of an answer have the same weight.

| after | {positions} | length |
| --- | {rule} | --- |
{rows}

![Loss and acceptance](training.png)

## How it was made

| setting | value |
| --- | --- |
{settings}
"""


def publish(draft: Draft, history: History, settings: Mapping[str, Any], folder: Path) -> None:
    """Writes config.json, model.safetensors (float16), README.md, training.json, training.png.

    Args:
        settings: what the card lists, `model` and `method` among it.

    Raises:
        InputError: there is no room on the disk.
    """
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in draft.tensors().items()
    }
    config = draft.config() | {"dtype": "float16"}
    config.pop("_name_or_path", None)  # a folder of this machine
    config |= _older_rope(config)
    if draft.reduced:
        config["draft_vocab_size"] = len(draft.target_ids)
    write_atomically(folder / "model.safetensors", lambda part: part.write_bytes(save(tensors)))
    measures: list[dict[str, Any]] = [
        {"step": one.step, "loss": one.loss, "acceptance": one.acceptance, "length": one.length}
        for one in history.measures
    ]
    measures[0]["loss"] = None  # strict JSON has no word for "not a number"
    record = {"settings": dict(settings), "seconds": history.elapsed, "measures": measures}
    texts = {
        "training.json": json.dumps(record, indent=2),
        "README.md": _card(history, settings, folder),
        "config.json": json.dumps(config, indent=2),
    }
    for name, text in texts.items():
        write_atomically(folder / name, partial(_write_text, text + "\n"))
    plot(history, folder / "training.png")


def _older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters as transformers 4 had them, where other engines still look."""
    scaling = dict(config["rope_parameters"])
    theta = scaling.pop("rope_theta")
    is_scaled = scaling.get("rope_type", "default") != "default"
    return {"rope_theta": theta, "rope_scaling": scaling if is_scaled else None}


def _write_text(text: str, path: Path) -> None:
    path.write_text(text)


def _card(history: History, settings: Mapping[str, Any], folder: Path) -> str:
    width = len(history.measures[0].acceptance)
    rows = [
        " | ".join(
            [
                "",
                f"{one.step} steps",
                *(f"{share:.2f}" for share in one.acceptance),
                f"{one.length:.2f}",
                "",
            ]
        ).strip()
        for one in (history.measures[0], history.measures[-1])
    ]
    return _CARD.format(
        model=settings["model"],
        method=settings["method"],
        kind=_KINDS[settings["method"]],
        folder=folder.name,
        positions=" | ".join(str(i + 1) for i in range(width)),
        rule=" | ".join("---" for _ in range(width)),
        rows="\n".join(rows),
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
    ).rstrip()
