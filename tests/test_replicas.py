"""Rows of a batch go to their replicas and come back: run on a CPU that stands for two devices."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from max import tree
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Graph, TensorType, TensorValue, ops
from max.nn.kv_cache import KVCacheParams
from max.pipelines.context import TextContext, TokenBuffer
from max.pipelines.kv_cache import PagedKVCacheManagerInterface
from max.pipelines.lib import KVCacheConfig

from unispec.kv_cache.manager import make_cache_manager
from unispec.kv_cache.views import as_one_batch, grown_view, take_copies
from unispec.pipelines.targets.deepseek.replicas import Replicas

REF = DeviceRef.CPU()
WIDTH, DRAFTS, ROUNDS = 2, 2, 3


@pytest.fixture(scope="module")
def session() -> InferenceSession:
    return InferenceSession(devices=[CPU()])


@pytest.fixture(scope="module")
def params() -> KVCacheParams:
    """Of two replicas on one processor."""
    return KVCacheConfig(kv_cache_page_size=128).to_params(
        dtype=DType.float32,
        n_kv_heads=1,
        head_dim=16,
        num_layers=1,
        devices=[REF, REF],
        data_parallel_degree=2,
        num_draft_tokens=DRAFTS,
        speculative_method="mtp",
    )


@pytest.fixture(scope="module")
def replicas_model(session: InferenceSession, params: KVCacheParams) -> Model:
    """Puts out what each replica gets of merged tokens, what comes back, and rounds of a draft."""
    types = [
        TensorType(DType.float32, ["num_merged", WIDTH], REF),
        TensorType(DType.uint32, ["num_row_offsets"], REF),
        TensorType(DType.uint32, ["num_row_offsets"], REF),
        TensorType(DType.int64, [3], REF),
        TensorType(DType.int64, ["batch", "num_draft_tokens"], REF),
        *tree.leaves(params.get_symbolic_inputs()),
    ]
    with Graph("replicas", input_types=types) as graph:
        x, merged_offsets, row_offsets, splits, drafts, *caches = graph.inputs
        copies = take_copies(params, iter(caches))[0]
        cache = as_one_batch(copies)
        extra = {"data_parallel_splits": [splits], "host_input_row_offsets": [row_offsets]}
        step: Any = SimpleNamespace(
            extra={**extra, "ep_inputs": []}, draft_tokens=drafts.tensor, copies=[copies]
        )
        mesh = Replicas.of(step, cache, {"signal_buffers": (), "copies": copies})
        parts = mesh.scatter([x.tensor], merged_offsets.tensor, cache)
        assert [copy is part for copy, part in zip(copies, parts.caches, strict=True)] == [1, 1]
        doubled = mesh.gather([part * 2 for part in parts.xs], x.tensor)

        def unfinished(round_: TensorValue, *state: TensorValue) -> TensorValue:
            return round_ < ROUNDS

        def a_round(
            round_: TensorValue, feature: TensorValue, lengths: TensorValue
        ) -> list[TensorValue]:
            view = grown_view(cache, lengths, 1)
            width = lengths.shape[0] + 1
            ramp = ops.range(0, width, 1, out_dim=width, dtype=DType.uint32, device=REF)
            own = mesh.scatter([feature], ramp, view)
            for copy, seen in zip(copies, own.caches, strict=True):
                assert seen.attention_dispatch_metadata is copy.draft_attention_dispatch_metadata
                assert seen.mla_num_partitions is copy.draft_mla_num_partitions
                assert seen.lookup_table is copy.lookup_table
                assert seen.kv_blocks is copy.kv_blocks
            # Each replica adds its rows' lengths, and how many rows it has.
            added = [
                part
                + ops.unsqueeze(copy.cache_lengths.cast(DType.float32), 1)
                + offsets[-1].cast(DType.float32) * 1000
                for part, offsets, copy in zip(own.xs, own.row_offsets, own.caches, strict=True)
            ]
            return [round_ + 1, mesh.gather(added, feature).rebind(feature.shape), lengths + 1]

        begin = ops.constant(0, DType.int64, REF)
        first = ops.broadcast_to(
            ops.constant(0.0, DType.float32, REF), [drafts.tensor.shape[0], WIDTH]
        )
        _, rounds, _ = ops.while_loop([begin, first, cache.cache_lengths], unfinished, a_round)
        graph.output(*parts.xs, *parts.row_offsets, doubled, cache.cache_lengths, rounds)
    return session.load(graph)


@pytest.fixture
def manager(params: KVCacheParams) -> PagedKVCacheManagerInterface:
    return make_cache_manager(params, num_pages=16, max_batch_size=8, draft_reads_next_token=False)


def rows_of(
    manager: PagedKVCacheManagerInterface, lengths: list[list[int]]
) -> Iterator[list[TextContext]]:
    for replica, batch in enumerate(lengths):
        contexts = []
        for length in batch:
            tokens = TokenBuffer(np.arange(length + 1, dtype=np.int64))
            context = TextContext(max_length=256, tokens=tokens)
            manager.claim(context, replica)
            manager.alloc(context)
            context.tokens.skip_processing(length)
            contexts.append(context)
        yield contexts


@pytest.mark.parametrize(
    ("news", "lengths"),
    [
        ([[3, 1], [2]], [[0, 10], [5]]),
        ([[1], [1, 4, 1]], [[7], [20, 1, 130]]),
        ([[2], []], [[9], []]),
    ],
    ids=["two and one", "one and three", "one and none"],
)
def test_rows_go_to_their_replicas_and_come_back(
    replicas_model: Model,
    manager: PagedKVCacheManagerInterface,
    news: list[list[int]],
    lengths: list[list[int]],
) -> None:
    """Rows of new tokens and two drafts each; then rounds of one token a row."""
    flat, cached = list(chain(*news)), list(chain(*lengths))
    merged = np.array(flat) + DRAFTS
    x = np.arange(merged.sum() * WIDTH, dtype=np.float32).reshape(-1, WIDTH)
    offsets = np.cumsum([0, *merged], dtype=np.uint32)
    splits = np.cumsum([0, *map(len, news)], dtype=np.int64)
    caches = manager.runtime_inputs(list(rows_of(manager, lengths)))
    outputs = replicas_model.execute(
        *map(
            Buffer.from_numpy,
            (
                x,
                offsets,
                np.cumsum([0, *flat], dtype=np.uint32),
                splits,
                np.full((len(flat), DRAFTS), -1),
            ),
        ),
        *tree.leaves(caches),
    )
    xs_0, xs_1, offsets_0, offsets_1, doubled, all_lengths, rounds = [
        output.to_numpy() for output in outputs
    ]
    cut = offsets[splits[1]]
    np.testing.assert_array_equal(xs_0, x[:cut])
    np.testing.assert_array_equal(xs_1, x[cut:])
    assert offsets_0.tolist() == [0, *np.cumsum(merged[: splits[1]])]
    assert offsets_1.tolist() == [0, *np.cumsum(merged[splits[1] :])]
    np.testing.assert_array_equal(doubled, 2 * x)
    assert all_lengths.tolist() == cached
    counts = np.repeat([len(batch) for batch in news], [len(batch) for batch in news])
    expected = sum(np.array(cached) + round_ + 1000 * counts for round_ in range(ROUNDS))
    np.testing.assert_array_equal(rounds, np.stack([expected] * WIDTH, axis=1))
