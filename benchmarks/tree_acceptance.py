"""What a tree of an EAGLE-3 draft's choices would accept, against its chains, in torch.

Along the target's greedy answers to the unseen prompts: at each position the rank that the draft
gives to the token that follows, and to those behind it after right ones. The tree is that of
`tree.py`: three first choices, two or one behind each.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from safetensors.torch import load_file
from torch import Tensor

from unispec.chat import encode_message
from unispec.checkpoints.demo import demo_draft_folder, demo_model_folder, ensure_demo_model
from unispec.training import TorchTarget
from unispec.training.collection import Example
from unispec.training.eagle3 import Eagle3Draft
from unispec.training.settings import DraftShape

PROMPTS = Path(__file__).with_name("unseen_prompts.txt").read_text(encoding="utf-8").splitlines()
LEVELS = 4


def load(target: TorchTarget, folder: Path) -> Eagle3Draft:
    """The packaged draft as `unispec train` has it."""
    tensors = load_file(folder / "model.safetensors")
    offsets = tensors.pop("d2t")
    draft = Eagle3Draft(
        target.config,
        target.norm,
        embedding=target.embedding,
        head=target.head,
        target_ids=torch.arange(len(offsets)) + offsets,
    )
    draft.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return draft.eval()


@torch.inference_mode()
def ranks(draft: Eagle3Draft, example: Example) -> Tensor:
    """Rank, from 0, of the true token in each of four rounds, int64 `[A, 4]`."""
    first, last = example.prompt_length - 1, len(example.tokens) - LEVELS - 1
    row = torch.arange(len(example.tokens) - 1)
    measured = (row >= first) & (row < last)
    outputs = draft.outputs([example], [measured | True, *[measured] * (LEVELS - 1)])
    outputs[0] = outputs[0][measured]
    found = []
    for number, output in enumerate(outputs):
        logits = output @ draft.head.T  # [A, N]
        true = draft.draft_ids[example.tokens[first + number + 2 : last + number + 2]]
        own = logits.gather(1, true.clamp(min=0)[:, None])
        rank = (logits > own).sum(dim=1)
        found.append(rank.where(true >= 0, logits.shape[1]))
    return torch.stack(found, dim=1)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--new-tokens", type=click.IntRange(min=8), default=48, help="For each prompt.")
def main(new_tokens: int) -> None:
    """Prints the expected tokens of a step."""
    target = TorchTarget(str(ensure_demo_model(demo_model_folder())))
    draft = load(target, demo_draft_folder("eagle3"))
    layers = DraftShape(method="eagle3").tapped_layers(target.config)
    prompts = [encode_message(target.tokenizer, prompt) for prompt in PROMPTS]
    answered = target.answers(prompts, [0.0] * len(prompts), layers, new_tokens, seed=0)
    rank = torch.cat(
        [
            ranks(draft, Example(torch.tensor(one.tokens), one.features.float(), one.prompt_length))
            for one in answered
            if len(one.tokens) - one.prompt_length > LEVELS
        ]
    )
    best, second = rank == 0, rank == 1
    for k in (1, 3, 4):
        click.echo(f"K = {k}  length {1 + best[:, :k].cumprod(1).sum(1).float().mean():.3f}")
    accepted = (
        (rank[:, 0] < 3)
        + ((best[:, 0] & (rank[:, 1] < 2)) | ((rank[:, 0] < 3) & best[:, 1])).long()
        + (best[:, 0] & ((best[:, 1] & (rank[:, 2] < 2)) | (second[:, 1] & best[:, 2]))).long()
        + best.all(dim=1).long()
    )
    length = 1 + accepted.float().mean()
    click.echo(f"tree of 12  length {length:.3f}  ({len(rank):,} positions)")


if __name__ == "__main__":
    main()
