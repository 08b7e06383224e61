"""The target answers many prompts at once; an answer that has ended leaves the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

__all__ = ["answer", "draw"]


@torch.inference_mode()
def answer(
    model: Any,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    max_new_tokens: int,
    eos: Sequence[int],
    seed: int,
    on_pass: Callable[[Tensor, Tensor, Tensor], None],
) -> list[list[int]]:
    """Answers prompts in one batch.

    Args:
        model: a causal language model of transformers.
        prompts: token ids, none of them empty.
        temperatures: of each answer; 0 is greedy.
        max_new_tokens: longest answer.
        eos: tokens that end one.
        seed: of the sampling.
        on_pass: called after each pass with the prompts that it read `[N]`, where in prompt and
            answer its tokens lie `[N, T]` (padding before a prompt is negative), and the output
            of the final norm `[N, T, H]`; it must not keep them.

    Returns:
        The answers, the tokens that ended them included.

    Raises:
        ArithmeticError: a logit is no number.
    """
    device = model.device
    count, longest = len(prompts), max(map(len, prompts))
    padding = torch.tensor([longest - len(ids) for ids in prompts], device=device)  # [S]
    heat = torch.tensor(temperatures, device=device)  # [S]
    ends = torch.tensor(list(eos), dtype=torch.long, device=device)
    tokens = torch.tensor(
        [[0] * (longest - len(ids)) + list(ids) for ids in prompts], device=device
    )  # [N, T]
    chance = torch.Generator().manual_seed(seed)
    cache = _roomy_cache(model.config.num_hidden_layers, count, longest + max_new_tokens)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    rows = torch.arange(count, device=device)  # [N], the prompts still answered
    answers: list[list[int]] = [[] for _ in prompts]
    start = 0
    for length in range(longest, longest + max_new_tokens):
        all_places = torch.arange(length, device=device) - padding[rows, None]  # [N, L]
        places = all_places[:, start:]  # [N, T]
        hidden = decoder(
            input_ids=tokens,
            attention_mask=(all_places >= 0).long(),
            position_ids=places.clamp(min=0),
            past_key_values=cache,
        ).last_hidden_state
        on_pass(rows, places, hidden)
        # Drawn for all prompts, so that none's answer depends on when others end.
        draws = torch.rand(count, generator=chance).to(device)[rows]
        drawn = draw(head(hidden[:, -1]).float(), heat[rows], draws)  # [N]
        for row, token in zip(rows.tolist(), drawn.tolist(), strict=True):
            answers[row].append(token)
        left = ~torch.isin(drawn, ends)
        staying = int(left.sum())
        if staying == 0:
            break
        # The last of those that stay move to the places of those that leave.
        holes = (~left[:staying]).nonzero()[:, 0]
        movers = staying + left[staying:].nonzero()[:, 0]
        if len(holes):
            for layer in cache.layers:
                layer.move(movers, holes)
            for column in (rows, drawn):
                column[holes] = column[movers]
        rows, tokens = rows[:staying], drawn[:staying, None]
        start = length
    return answers


def draw(logits: Tensor, temperatures: Tensor, draws: Tensor) -> Tensor:
    """One token for each row, by inverting the distribution function.

    Args:
        logits: float32 `[N, V]`.
        temperatures: `[N]`; 0 takes the best.
        draws: uniform in [0, 1), `[N]`.

    Raises:
        ArithmeticError: a logit is no number.
    """
    greedy = temperatures == 0
    divisors = temperatures.where(~greedy, 1.0)[:, None]
    cumulative = (logits / divisors).softmax(dim=-1).cumsum(dim=-1)  # [N, V]
    total = cumulative[:, -1:]
    if not total.isfinite().all():
        raise ArithmeticError("a logit is no number")
    drawn = torch.searchsorted(cumulative, draws[:, None] * total, right=True)[:, 0]
    return logits.argmax(dim=-1).where(greedy, drawn)


def _roomy_cache(layers: int, rows: int, length: int) -> Any:
    return Cache(layers=[_RoomyLayer(rows, length) for _ in range(layers)])


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values in room for all tokens; transformers' own copies them for each token.

    Args:
        rows: of the batch at its beginning.
        length: tokens of the longest row.
    """

    def __init__(self, rows: int, length: int) -> None:
        super().__init__()
        self._shape = rows, length
        self._room: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds `[N, G, T, D]` to the first N rows and returns all of theirs, `[N, G, L, D]`."""
        rows, length = self._shape
        _, heads, _, width = key_states.shape
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = tuple(key_states.new_empty(rows, heads, length, width) for _ in range(2))
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        found = []
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[: len(states), :, start:end] = states
            found.append(room[: len(states), :, :end])
        self.keys, self.values = found
        return self.keys, self.values

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copies some rows to other places."""
        for room in self._room:
            room[target] = room[source]
