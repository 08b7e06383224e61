"""Turns a batch of requests into the graph's inputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, Device
from max.pipelines.context import TextContext
from max.pipelines.request import RequestID

from unispec.pipelines.speculative.step import VOID_TOKEN
from unispec.sampling.buffers import SamplingBuffers

from .deferred import Deferred
from .inputs import PersistentInputBuffers
from .rows import Row, make_row

__all__ = ["BatchBuilder"]


class BatchBuilder:
    """Owns the host memory of the inputs and the rows of the requests.

    Args:
        most_verified: the most drafts of a row that a step verifies.
        num_speculative_tokens: the most tokens that a step proposes; 0 without a draft.
        sampled_drafts: whether the graph takes the drafts' distributions.
        thinking_phase: whether the graph takes which rows are inside a thinking block.
        feature_log: `[L, F]` on the device, where a draft need not read in each step.
        shared_page_size: tokens of a cache page, where requests share pages that are full.

    Attributes:
        rows: what is kept of each request, by its id.
        num_speculative_tokens: how many tokens the next step proposes; may be lowered, and raised
            again, between two steps.
        deferred: what the draft has not read; None: no draft, or it reads in each step.
        device: where the inputs of each row are.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_batch_input_tokens: int,
        vocab_size: int,
        most_verified: int,
        num_speculative_tokens: int,
        device: Device,
        sampled_drafts: bool = False,
        thinking_phase: bool = False,
        feature_log: Buffer | None = None,
        shared_page_size: int | None = None,
    ) -> None:
        self.rows: dict[RequestID, Row] = {}
        self.num_speculative_tokens = num_speculative_tokens
        self.deferred = (
            None
            if feature_log is None
            else Deferred(feature_log, shared_page_size, self.rows, device)
        )
        self._vocab_size = vocab_size
        self.device = device
        self._sampled_drafts = sampled_drafts
        self._thinking_phase = thinking_phase
        self._persistent = PersistentInputBuffers.alloc(
            max_batch_size, max_batch_input_tokens, device
        )
        self._sampling = SamplingBuffers(max_batch_size, vocab_size, most_verified + 1, device)
        self._tokens = np.zeros(max_batch_input_tokens, np.int64)
        self._offsets = np.zeros(max_batch_size + 1, np.uint32)
        self._drafts = np.zeros(max_batch_size * most_verified, np.int64)
        self._known_next = np.zeros(max_batch_size, np.int64)

    def row(self, context: TextContext) -> Row:
        """The request's row; made from its sampling parameters when it is new."""
        if context.request_id not in self.rows:
            self.rows[context.request_id] = make_row(
                context.sampling_params,
                context.tokens.prompt,
                self._vocab_size,
                logprobs=context.log_probabilities or None,
            )
        return self.rows[context.request_id]

    def fields(self, contexts: Sequence[TextContext]) -> dict[str, Buffer]:
        """The inputs of one step by field name, but for `kv_cache_inputs`.

        A row with fewer drafts than another in the batch gets void ones.

        Raises:
            InputError: a new request has a token outside the vocabulary.
        """
        count = len(contexts)
        rows = [self.row(context) for context in contexts]
        width = max((len(row.drafts) for row in rows), default=0)
        offsets = self._offsets[: count + 1]
        drafts = self._drafts[: count * width].reshape(count, width)
        drafts[...] = VOID_TOKEN
        known_next = self._known_next[:count]
        for index, (context, row) in enumerate(zip(contexts, rows, strict=True)):
            start = int(offsets[index])
            active = context.tokens.active
            self._tokens[start : start + len(active)] = active
            offsets[index + 1] = start + len(active)
            drafts[index, : len(row.drafts)] = row.drafts
            chunked = context.tokens.actively_chunked
            position = context.tokens.current_position
            known_next[index] = context.tokens.all[position] if chunked else VOID_TOKEN
        bitmask = self._bitmask(contexts, rows, width)
        proposed = self.num_speculative_tokens
        tokens, row_offsets = self._persistent.write(self._tokens[: int(offsets[-1])], offsets)
        fields = {
            "tokens": tokens,
            "input_row_offsets": row_offsets,
            "return_n_logits": Buffer.from_numpy(np.array([width + 1], np.int64)),
            "draft_tokens": Buffer.from_numpy(drafts).to(self.device),
            "known_next_tokens": Buffer.from_numpy(known_next).to(self.device),
            "num_speculative_tokens": Buffer.from_numpy(np.array(proposed, np.int64)),
            **self._sampling.fill([row.sampling for row in rows], bitmask),
        }
        if self._sampled_drafts:
            fields["draft_probs_full"] = self._draft_probs(rows, width)
        if self._thinking_phase:
            thinking = np.array([context.in_reasoning_phase for context in contexts])
            fields["in_thinking_phase"] = Buffer.from_numpy(thinking).to(self.device)
        if self.deferred is not None:
            lengths = [context.tokens.active_length + width for context in contexts]
            fields |= self.deferred.fields(contexts, lengths, proposed)
        return fields

    def nothing_deferred(self, lengths: Sequence[int]) -> dict[str, Any]:
        """The inputs by name that say of rows that the draft has read all.

        Args:
            lengths: merged tokens of each row.
        """
        return {} if self.deferred is None else self.deferred.nothing(lengths)

    def _bitmask(
        self, contexts: Sequence[TextContext], rows: Sequence[Row], width: int
    ) -> npt.NDArray[np.int32]:
        """Masks of grammars, and of what ends an answer too early: `[B, K + 1, V / 32]`."""
        bitmask = self._sampling.bitmask(len(rows), width + 1)
        for index, (context, row) in enumerate(zip(contexts, rows, strict=True)):
            if row.grammar is not None:
                padded = row.drafts + [VOID_TOKEN] * (width - len(row.drafts))
                row.grammar.fill_bitmask(bitmask[index], padded)
            early = min(max(row.min_new_tokens - row.generated, 0), width + 1)
            _ban(bitmask[index, :early], context.eos_tracker.eos_token_ids)
            _ban(bitmask[index], row.ignored_eos)
        return bitmask

    def _draft_probs(self, rows: Sequence[Row], width: int) -> Buffer:
        """float32 `[B, K, V]`; zero where a row has no draft, 1 for one that was not drawn."""
        probs = np.zeros((len(rows), width, self._vocab_size), np.float32)
        for index, row in enumerate(rows):
            count = len(row.drafts)
            if row.draft_probs is not None:
                probs[index, :count] = row.draft_probs.read()[:count]
            else:
                probs[index, np.arange(count), row.drafts] = 1.0
        return Buffer.from_numpy(probs).to(self.device)


def _ban(allowed: npt.NDArray[np.int32], tokens: Collection[int]) -> None:
    """Takes tokens out of masks `[n, V / 32]`, where this leaves any.

    A text whose grammar is complete can only end, however short it is.
    """
    if len(allowed) and tokens:
        others = allowed.copy()
        for token in tokens:
            others[:, token // 32] &= ~np.array(1 << token % 32, np.uint32).view(np.int32)
        allowed[...] = np.where(others.any(axis=1, keepdims=True), others, allowed)
