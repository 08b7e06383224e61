"""Inputs of a unified graph on the host side, and the buffers that decode steps reuse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from max import tree
from max.driver import Buffer, Device, batch_inplace_copy
from max.dtype import DType
from max.nn.kv_cache import KVCacheInputs
from max.pipelines.lib import ModelInputs

from unispec.errors import InputError
from unispec.pipelines.speculative.deferred import DEFERRED_INPUTS
from unispec.pipelines.speculative.step import INPUT_ORDER
from unispec.sampling.inputs import SamplingFields

__all__ = [
    "PersistentInputBuffers",
    "StepModelInputs",
    "TokenInputs",
    "needed_input",
    "refuse_inputs",
    "wait_for_copies",
]


@dataclass(kw_only=True)
class TokenInputs(ModelInputs):
    """The tokens of a step; the fields that come first in the documented constructors."""

    tokens: Buffer
    """int64 `[T]`: the new verified tokens of each row, ragged."""
    input_row_offsets: Buffer
    """uint32 `[B + 1]`: where each row starts in `tokens`."""
    return_n_logits: Buffer
    """int64 `[1]` on the host: logit rows per row, K + 1; a unified graph counts the drafts."""
    draft_tokens: Buffer | None = None
    """int64 `[B, K]`: the last step's proposals; -1 where a row has nothing to verify."""
    draft_kv_blocks: list[Buffer] | None = None
    """Not taken: the draft's pages are part of `kv_cache_inputs`."""


@dataclass(kw_only=True)
class StepModelInputs(SamplingFields[Buffer | None], TokenInputs):
    """One step's inputs. B rows, T new tokens in all, K draft tokens a row, V the vocabulary.

    Every field that is not marked as not taken, or as taken by some graphs only,
    must be set before `buffers` is read.
    """

    GRAPH_ORDER: ClassVar[tuple[str, ...]] = INPUT_ORDER
    """The fields in the order of the graph's inputs."""
    NOT_TAKEN: ClassVar[tuple[str, ...]] = (
        "draft_kv_blocks",
        "lora_ids",
        "lora_ranks",
        "lora_buffers",
        "hidden_states",
    )
    """Fields that must stay unset: the graph has no such input."""

    kv_cache_inputs: KVCacheInputs[Buffer, Buffer] | None = None
    """Pages and lengths of the target's cache and, where there is a draft, of the draft's."""
    hidden_states: Buffer | list[Buffer] | None = None
    """Not taken: the graph keeps its hidden states to itself."""
    in_thinking_phase: Buffer | None = None
    """bool `[B]`; taken by a graph with relaxed acceptance only."""
    lora_ids: Buffer | None = None
    """Not taken."""
    lora_ranks: Buffer | None = None
    """Not taken."""
    known_next_tokens: Buffer | None = None
    """int64 `[B]`: the token after a prefill chunk; -1 where the step decides it."""
    num_speculative_tokens: Buffer | None = None
    """int64 scalar on the host: how many tokens to propose."""
    draft_probs_full: Buffer | None = None
    """float32 `[B, K, V]`; taken by a graph with sampled drafts only."""
    feature_log: Buffer | None = None
    """`[L, F]`: features of positions that the draft has not read. This and what follows are taken
    by a graph whose draft need not read in each step; see `DeferredInputs`."""
    logged_features: Buffer | None = None
    """The same buffer."""
    log_start: Buffer | None = None
    """int64 scalar on the host: the log's row where a step writes whose draft does not read."""
    num_logged: Buffer | None = None
    """int64 scalar on the host: how many features it writes; 0 where the draft reads, as
    it must where it proposes."""
    deferred_rows: Buffer | None = None
    """int64 `[E]`: the log's row of each position that the draft has to read, ragged."""
    deferred_tokens: Buffer | None = None
    """int64 `[E]`: the verified token after each position."""
    deferred_counts: Buffer | None = None
    """uint32 `[B]`: positions of each row."""
    max_deferred: Buffer | None = None
    """uint32 `[1]` on the host: the largest of them."""
    unread_places: Buffer | None = None
    """int64 `[U]`: of what the draft reads, indices among deferred and merged positions."""
    unread_offsets: Buffer | None = None
    """uint32 `[B + 1]`: where each row starts in `unread_places`."""

    @property
    def graph_order(self) -> Sequence[str]:
        """The fields that the graph needs, in the order of its inputs."""
        return self.GRAPH_ORDER

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The set inputs in the graph's order, see `StepSignature`.

        Raises:
            InputError: an input is set that the graph does not take, or one that it needs is not.
        """
        refuse_inputs(self, self.NOT_TAKEN)
        needed = (needed_input(self, name) for name in self.graph_order)
        names = ("draft_probs_full", "in_thinking_phase", *DEFERRED_INPUTS)
        optional = (getattr(self, name) for name in names)
        flat: list[Buffer] = []
        for value in chain(needed, (buffer for buffer in optional if buffer is not None)):
            # `leaves` is slow, and most values are leaves.
            flat += [value] if isinstance(value, Buffer) else tree.leaves(value)
        return tuple(flat)


def refuse_inputs(inputs: ModelInputs, names: Iterable[str]) -> None:
    """Refuses inputs that a graph does not take.

    Raises:
        InputError: one of these fields is set.
    """
    for name in names:
        if getattr(inputs, name):
            raise InputError(f"{name} is set, but the compiled graph does not take it: unset it")


def needed_input(inputs: ModelInputs, name: str) -> object:
    """The value of a field that a graph needs.

    Raises:
        InputError: it is not set.
    """
    value = getattr(inputs, name)
    if value is None:
        raise InputError(f"{name} is not set, but the compiled graph needs it: set it")
    return value


def wait_for_copies(device: Device) -> None:
    """Waits on a CPU until what was copied to its buffers has arrived.

    In max 26.7 a copy to a CPU buffer returns early, and a graph does not wait for it.
    """
    if device.is_host:
        device.synchronize()


@dataclass
class PersistentInputBuffers:
    """Token and row-offset memory for the largest step, reserved once."""

    tokens: Buffer
    """int64 `[max_batch_input_tokens]`."""
    input_row_offsets: Buffer
    """uint32 `[max_batch_size + 1]`."""

    @classmethod
    def alloc(
        cls, max_batch_size: int, max_batch_input_tokens: int, device: Device
    ) -> PersistentInputBuffers:
        """Reserves both buffers on the device, zeroed.

        Args:
            max_batch_size: most rows in one step.
            max_batch_input_tokens: most new tokens in one step.

        Raises:
            InputError: no row, or fewer tokens than rows.
        """
        if not 1 <= max_batch_size <= max_batch_input_tokens:
            raise InputError(
                f"max_batch_size {max_batch_size} is not between 1 and max_batch_input_tokens"
                f" {max_batch_input_tokens}: every row brings at least one token"
            )
        return cls(
            tokens=Buffer.zeros([max_batch_input_tokens], DType.int64, device),
            input_row_offsets=Buffer.zeros([max_batch_size + 1], DType.uint32, device),
        )

    def write(
        self, tokens: npt.NDArray[np.int64], row_offsets: npt.NDArray[np.uint32]
    ) -> tuple[Buffer, Buffer]:
        """Copies a step's tokens `[T]` and offsets `[B + 1]` in; returns views of them.

        Args:
            tokens: the new tokens of all rows.
            row_offsets: where each row starts, and the end.

        Raises:
            InputError: the step is larger than what was reserved.
        """
        if len(tokens) > self.tokens.shape[0] or len(row_offsets) > self.input_row_offsets.shape[0]:
            raise InputError(
                f"a step of {len(row_offsets) - 1} rows and {len(tokens)} tokens is larger than the"
                f" {self.input_row_offsets.shape[0] - 1} rows and {self.tokens.shape[0]} tokens"
                " reserved: raise max_batch_size or max_batch_input_tokens"
            )
        token_view = self.tokens[: len(tokens)]
        offset_view = self.input_row_offsets[: len(row_offsets)]
        # On a CPU this returns before it has copied; the model waits for it.
        batch_inplace_copy(
            [token_view, offset_view],
            [Buffer.from_numpy(tokens), Buffer.from_numpy(row_offsets)],
        )
        return token_view, offset_view
