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
    """Answers prompts in one batch, which B below is the present size of.

    Args:
        model: a causal language model of transformers.
        prompts: token ids, none of them empty.
        temperatures: one for each answer; 0 is greedy.
        max_new_tokens: length of the longest answer.
        eos: tokens that end an answer.
        on_pass: called after each pass with the indices of the prompts in it `[B]`, the positions
            of its tokens in prompt and answer `[B, T]` (negative for padding before a prompt),
            and the output of the final norm `[B, T, H]`; it must not keep them.

    Returns:
        The answers, with the tokens that ended them.

    Raises:
        ArithmeticError: a logit is NaN or infinite.
    """
    device = model.device
    count, longest = len(prompts), max(map(len, prompts))
    padding = torch.tensor([longest - len(ids) for ids in prompts], device=device)
    temperature = torch.tensor(temperatures, device=device)
    ends = torch.tensor(list(eos), dtype=torch.long, device=device)
    tokens = torch.tensor(
        [[0] * (longest - len(ids)) + list(ids) for ids in prompts], device=device
    )  # [B, T]
    generator = torch.Generator().manual_seed(seed)
    cache = _preallocated_cache(model.config.num_hidden_layers, count, longest + max_new_tokens)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    rows = torch.arange(count, device=device)  # [B], the prompts still answered
    answers: list[list[int]] = [[] for _ in prompts]
    start = 0
    for length in range(longest, longest + max_new_tokens):
        all_positions = torch.arange(length, device=device) - padding[rows, None]  # [B, L]
        positions = all_positions[:, start:]  # [B, T]
        hidden = decoder(
            input_ids=tokens,
            attention_mask=(all_positions >= 0).long(),
            position_ids=positions.clamp(min=0),
            past_key_values=cache,
        ).last_hidden_state
        on_pass(rows, positions, hidden)
        # Drawn for all prompts, so that none's answer depends on when others end.
        draws = torch.rand(count, generator=generator).to(device)[rows]
        drawn = draw(head(hidden[:, -1]).float(), temperature[rows], draws)  # [B]
        for row, token in zip(rows.tolist(), drawn.tolist(), strict=True):
            answers[row].append(token)
        left = ~torch.isin(drawn, ends)
        staying = int(left.sum())
        if staying == 0:
            break
        # The last rows that stay move to where rows leave.
        freed = (~left[:staying]).nonzero()[:, 0]
        moved = staying + left[staying:].nonzero()[:, 0]
        if len(freed):
            for layer in cache.layers:
                layer.move(moved, freed)
            for column in (rows, drawn):
                column[freed] = column[moved]
        rows, tokens = rows[:staying], drawn[:staying, None]
        start = length
    return answers


def draw(logits: Tensor, temperatures: Tensor, draws: Tensor) -> Tensor:
    """One token for each row, by inverting the distribution function.

    Args:
        logits: float32 `[B, V]`.
        temperatures: `[B]`; 0 takes the most probable token.
        draws: uniform in [0, 1), `[B]`.

    Raises:
        ArithmeticError: a logit is NaN or infinite.
    """
    greedy = temperatures == 0
    divisors = temperatures.where(~greedy, 1.0)[:, None]
    cumulative = (logits / divisors).softmax(dim=-1).cumsum(dim=-1)  # [B, V]
    total = cumulative[:, -1:]
    if not total.isfinite().all():
        raise ArithmeticError("a logit is NaN or infinite")
    drawn = torch.searchsorted(cumulative, draws[:, None] * total, right=True)[:, 0]
    return logits.argmax(dim=-1).where(greedy, drawn)


def _preallocated_cache(layers: int, rows: int, length: int) -> Any:
    return Cache(layers=[_PreallocatedLayer(rows, length) for _ in range(layers)])


class _PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values in memory for all tokens; transformers' own copies them for each token.

    Args:
        rows: size of the batch at its beginning.
        length: tokens of the longest row.
    """

    def __init__(self, rows: int, length: int) -> None:
        super().__init__()
        self._shape = rows, length
        self._storage: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends `[B, kv_heads, T, head_dim]` to the first B rows.

        Returns:
            All keys and all values of these rows, `[B, kv_heads, L, head_dim]`.
        """
        rows, length = self._shape
        _, heads, _, width = key_states.shape
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = rows, heads, length, width
            self._storage = tuple(key_states.new_empty(shape) for _ in range(2))
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        found = []
        for storage, states in zip(self._storage, (key_states, value_states), strict=True):
            storage[: len(states), :, start:end] = states
            found.append(storage[: len(states), :, :end])
        self.keys, self.values = found
        return self.keys, self.values

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copies the rows `source` to the rows `target`."""
        for storage in self._storage:
            storage[target] = storage[source]
