"""What the tests train: a tiny target, prompts that it answers, drafts that learn fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference.target import TargetReference
from torch import Tensor

from unispec.methods import DRAFT_METHODS, Method
from unispec.training import Collection, DraftShape, TorchTarget, make_draft
from unispec.training.draft import Draft

__all__ = ["METHODS", "PROMPTS", "SETTINGS", "SHAPES", "card", "features", "rounded", "untrained"]


METHODS = pytest.mark.parametrize("method", DRAFT_METHODS)
PROMPTS = [f"{a} {b} and {a}" for a in "abcdefgh" for b in "stuvwx"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 48, "chat_template": False}


SHAPES = {
    "eagle": DraftShape(method="eagle"),
    "eagle3": DraftShape(method="eagle3"),
    "dflash": DraftShape(method="dflash", layers=2, block_size=4),
}


def untrained(target: TorchTarget, collection: Collection, method: Method) -> Draft:
    return make_draft(target, collection, SHAPES[method], seed=1)


def card() -> dict[str, str]:
    return {"model": "a tiny model", "method": "eagle"}


def rounded(draft: Draft) -> None:
    """Gives the module the weights that its checkpoint has."""
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(parameter.half().float())


def features(
    target: TorchTarget | TargetReference, ids: list[int], layers: Sequence[int]
) -> Tensor:
    """Not rounded to float16, as in decoding; no layers, or one too many, is the final norm."""
    last: list[Tensor] = []
    norm = target.model.get_decoder().norm
    hook = norm.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0]))
    with torch.inference_mode():
        output = target.model(torch.tensor([ids]), output_hidden_states=True)
    hook.remove()
    # transformers lists the last layer's output behind the norm only.
    *states, final = output.hidden_states[1:]
    outputs = [*states, *last, final]
    return torch.cat([outputs[i][0] for i in layers] or [final[0]], dim=-1).clone()
