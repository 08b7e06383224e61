"""What is found of an earlier prompt is right in both caches: no model, MAX's own cache manager.

Steps write what the entries of an EAGLE or MTP pair depend on: the target's on the token at their
position, the draft's on the one after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from max.driver import CPU
from max.dtype import DType
from max.graph import DeviceRef
from max.nn.kv_cache import (
    KVCacheParams,
    KVConnectorType,
    MHAKVCacheParams,
    MultiKVCacheParams,
    NullKVConnectorConfig,
)
from max.pipelines.context import TextContext, TokenBuffer
from max.pipelines.kv_cache import JengaKVCacheManager, PagedKVCacheManagerInterface

from unispec.errors import InputError
from unispec.kv_cache.manager import make_cache_manager

PAGE = 16
PAGES = 24


def cache(layers: int, heads: int, width: int, replicas: int = 1) -> KVCacheParams:
    return MHAKVCacheParams(
        dtype=DType.float32,
        n_kv_heads=heads,
        head_dim=width,
        num_layers=layers,
        page_size=PAGE,
        devices=[DeviceRef.CPU()] * replicas,
        data_parallel_degree=replicas,
        enable_prefix_caching=True,
        speculative_method="eagle",
        num_draft_tokens=3,
    )


def both(replicas: int = 1) -> MultiKVCacheParams:
    """Caches whose pages have nothing in common: 3 layers with 2 heads, and 2 layers with 5."""
    target, draft = cache(3, 2, 4, replicas), cache(2, 5, 8, replicas)
    return MultiKVCacheParams.from_params({"target": target, "draft": draft})


@dataclass
class Caches:
    """A manager, and steps that write into the pages that it names."""

    draft_reads_next_token: bool
    replicas: int = 1
    manager: PagedKVCacheManagerInterface = field(init=False)

    def __post_init__(self) -> None:
        self.manager = make_cache_manager(
            both(self.replicas),
            num_pages=PAGES,
            max_batch_size=4,
            draft_reads_next_token=self.draft_reads_next_token,
        )

    def begin(self, prompt: Sequence[int], replica: int = 0) -> TextContext:
        """A request whose pages are allocated, and filled from the cache where it knows them."""
        context = TextContext(max_length=200, tokens=TokenBuffer(np.array(prompt, np.int64)))
        self.manager.claim(context, replica)
        self.manager.alloc(context)
        return context

    def step(self, context: TextContext, token: int, replica: int = 0) -> None:
        """Writes the entries of what is not in the cache yet, and appends a token."""
        begin, end = context.tokens.processed_length, len(context.tokens)
        tokens = [*context.tokens.all[:end].tolist(), token]
        for name, entries in self._entries(context, replica):
            shift = int(name == "draft")
            for position in range(begin, end):
                entries(position)[...] = tokens[position + shift]
        context.advance_token_buffer(token)
        self.manager.step(context)

    def run(self, prompt: Sequence[int], new_tokens: int = 2, replica: int = 0) -> None:
        """A request from its prompt to its end."""
        context = self.begin(prompt, replica)
        for token in range(900, 900 + new_tokens):
            self.step(context, token, replica)
            self.manager.alloc(context)
        self.manager.release(context)

    def wrong(self, context: TextContext, replica: int = 0) -> list[tuple[str, int]]:
        """Which entries of a new request's known prefix are not those it would have written."""
        tokens = context.tokens.all.tolist()
        return [
            (name, position)
            for name, entries in self._entries(context, replica)
            for position in range(context.tokens.processed_length)
            if (entries(position) != tokens[position + (name == "draft")]).any()
        ]

    def _entries(self, context: TextContext, replica: int) -> Iterator[tuple[str, Any]]:
        batches = [[context] if at == replica else [] for at in range(self.replicas)]
        inputs: Any = self.manager.runtime_inputs(batches)
        CPU().synchronize()  # copies on a CPU return before they have copied
        for name in ("target", "draft"):
            one = inputs[name][replica]
            table, pages = one.lookup_table.to_numpy()[0], one.kv_blocks.to_numpy()
            # Of a page: keys and values, layers, positions, heads, features.
            yield (
                name,
                lambda at, table=table, pages=pages: pages[table[at // PAGE]][:, :, at % PAGE],
            )


PREFIX = range(100, 100 + 2 * PAGE)


@pytest.mark.parametrize("replica", [0, 1], ids=["same replica", "other replica"])
def test_prompts_that_part_at_a_pages_end_share_no_wrong_entry(replica: int) -> None:
    caches = Caches(draft_reads_next_token=True, replicas=2)
    assert isinstance(caches.manager, JengaKVCacheManager)
    caches.run([*PREFIX, 1, 2])
    other = caches.begin([*PREFIX, 3, 4], replica)
    assert other.tokens.processed_length == PAGE
    assert caches.wrong(other, replica) == []
    same = caches.begin([*PREFIX, 1, 4], replica)
    assert same.tokens.processed_length == 2 * PAGE
    assert caches.wrong(same, replica) == []


def test_a_wrong_entry_is_seen() -> None:
    """With MAX's own names, which are for drafts that read no next token."""
    caches = Caches(draft_reads_next_token=False)
    caches.run([*PREFIX, 1, 2])
    other = caches.begin([*PREFIX, 3, 4])
    assert other.tokens.processed_length == 2 * PAGE
    assert caches.wrong(other) == [("draft", 2 * PAGE - 1)]


def test_requests_side_by_side_share_what_both_have_written() -> None:
    """The second of two equal pages gives way to the first, if the token after it is the same."""
    caches = Caches(draft_reads_next_token=True)
    first, second, other = (caches.begin([*PREFIX, token]) for token in (1, 1, 3))
    for context in (first, second, other):
        caches.step(context, 5)
        caches.manager.alloc(context)
        assert caches.wrong(context) == []
    rows = [caches.manager.get_req_blocks_per_leaf(context) for context in (first, second, other)]
    assert all(len({tuple(row) for row in of_caches.values()}) == 1 for of_caches in rows)
    (one, two, three) = (next(iter(of_caches.values())) for of_caches in rows)
    assert one[:2] == two[:2]
    assert (one[0], one[1] == three[1]) == (three[0], False)
    # 3 pages of the first, and the last ones of the others.
    assert caches.manager.block_count().free == PAGES - 3 - 1 - 2


@pytest.mark.parametrize(("reads", "pages"), [(True, 1), (False, 2)], ids=["eagle-mtp", "dflash"])
def test_what_a_replica_has_is_counted_by_the_same_names(reads: bool, pages: int) -> None:
    caches = Caches(draft_reads_next_token=reads, replicas=2)
    caches.run([*PREFIX, 1, 2])
    asked = TextContext(max_length=99, tokens=TokenBuffer(np.array([*PREFIX, 3, 4], np.int64)))
    hits = caches.manager.get_prefix_cache_hit_counts(asked)
    assert [hit.device_blocks for hit in hits] == [pages, pages]
    assert not caches.manager.contains(asked)


def test_a_manager_has_the_pages_it_was_asked_for() -> None:
    manager = Caches(draft_reads_next_token=True).manager
    assert manager.block_count().total == manager.block_count().free == PAGES
    assert manager.effective_max_seq_length == PAGES * PAGE
    sizes = {buffer.shape[0] for buffer in manager.get_device_buffer(0).all_buffers}
    assert sizes == {PAGES + 1}  # and one that rows name where they have none


def test_pages_are_kept_on_the_device_only() -> None:
    elsewhere = NullKVConnectorConfig(type=KVConnectorType.dkv)
    params = replace(cache(1, 1, 4), kv_connector_config=elsewhere)
    with pytest.raises(InputError, match=r"kv_connector dkv is not supported: .*leave it out"):
        make_cache_manager(params, num_pages=4, max_batch_size=1, draft_reads_next_token=True)
