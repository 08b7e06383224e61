"""What verifying a tree of drafts costs: 12 nodes against one row and chains, by MAX's own kernels.

SmolLM2-135M's shape with random weights, batch 1. Six of its thirty layers and the head are timed
apart, so that each run is short; norms and embedding are left out. A tree needs what a chain does
not: a bias that hides who is no ancestor, a position for each node, and the accepted path's keys
and values stored once more, in order.
"""

# ruff: noqa: E402
from __future__ import annotations

from unispec.waiting import wait_asleep

wait_asleep()  # before MAX is imported, as the command line does

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import BufferType, DeviceRef, Graph, TensorType, TensorValue, Weight, ops
from max.nn.attention import MHAMaskVariant
from max.nn.kernels import flash_attention_ragged, rope_split_store_ragged
from max.nn.kv_cache import MHAKVCacheParams, PagedCacheValues

Array = npt.NDArray[Any]

LAYERS, ALL_LAYERS = 6, 30
HEADS, KEY_HEADS, WIDTH, PAGE = 9, 3, 64, 128
HIDDEN, MLP, VOCAB = 576, 1536, 49152
EXTENT = 16
"""Keys before a row that its bias covers; at least as many as nodes."""
PARENTS = (0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 8)
"""Of nodes 1 to 11; node 0 is the step's certain token."""
PATH = (0, 1, 4, 8, 11)
"""Nodes that are accepted."""
SHAPES = {
    "qkv": (HIDDEN + 2 * KEY_HEADS * WIDTH, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "up": (2 * MLP, HIDDEN),
    "down": (HIDDEN, MLP),
}
HOST = DeviceRef.CPU()
PARAMS = MHAKVCacheParams(
    dtype=DType.float32,
    n_kv_heads=KEY_HEADS,
    head_dim=WIDTH,
    num_layers=LAYERS,
    page_size=PAGE,
    devices=[HOST],
)


class Case(NamedTuple):
    """Rows of a step."""

    rows: int
    """How many."""
    is_tree: bool
    """Whether they are nodes of a tree; else each follows the one before."""

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.rows} nodes, tree" if self.is_tree else f"{self.rows} rows"


CASES = (Case(1, False), Case(2, False), Case(4, False), Case(12, False), Case(12, True))


def ancestors() -> list[set[int]]:
    """Of each node: itself and those above it."""
    seen: list[set[int]] = [{0}]
    for node, parent in enumerate(PARENTS, start=1):
        seen.append({*seen[parent], node})
    return seen


def bias(case: Case) -> Array:
    """What is added to the score of the key so far behind, float32 `[rows, HEADS, EXTENT]`."""
    found = np.zeros((case.rows, HEADS, EXTENT), np.float32)
    for row, seen in enumerate(ancestors()[: case.rows] if case.is_tree else ()):
        for distance in range(min(row + 1, EXTENT)):
            if row - distance not in seen:
                found[row, :, distance] = -1e30
    return found


def typed(dtype: DType, *shape: Any) -> TensorType:
    """A graph input on the CPU."""
    return TensorType(dtype, list(shape), HOST)


def product(x: TensorValue, name: str, shape: tuple[int, int]) -> TensorValue:
    """`x` times a weight of its own."""
    return x @ ops.transpose(Weight(name, DType.float32, shape, HOST), 0, 1)


def layers(is_tree: bool) -> Callable[..., TensorValue]:
    """The body of a graph of six layers, each attention and MLP."""

    def body(
        cache: PagedCacheValues,
        x: TensorValue,
        freqs: TensorValue,
        offsets: TensorValue,
        scores: TensorValue,
        positions: TensorValue,
        path: TensorValue,
        path_offsets: TensorValue,
    ) -> TensorValue:
        rows, kept = x.shape[0], []
        rope = {"freqs_cis": freqs, "n_heads": HEADS, "interleaved": False}
        for number in range(LAYERS):
            index = ops.constant(number, DType.uint32, device=HOST)
            kept.append(product(x, f"qkv{number}", SHAPES["qkv"]))
            query = rope_split_store_ragged(
                PARAMS,
                kept[-1],
                offsets,
                kv_collection=cache,
                layer_idx=index,
                position_ids=positions if is_tree else None,
                **rope,
            )
            attended = flash_attention_ragged(
                PARAMS,
                query.reshape([rows, HEADS, WIDTH]),
                offsets,
                cache,
                index,
                MHAMaskVariant.CAUSAL_MASK,
                WIDTH**-0.5,
                rel_logits=scores if is_tree else None,
            )
            x = x + product(attended.reshape([rows, HIDDEN]), f"o{number}", SHAPES["o"])
            both = product(x, f"up{number}", SHAPES["up"])
            inner = ops.silu(both[:, :MLP]) * both[:, MLP:]
            x = x + product(inner, f"down{number}", SHAPES["down"])
        for number in range(LAYERS if is_tree else 0):
            rope_split_store_ragged(
                PARAMS,
                ops.gather(kept[number], path, axis=0),
                path_offsets,
                kv_collection=cache,
                layer_idx=ops.constant(number, DType.uint32, device=HOST),
                **rope,
            )
        return x

    return body


def compile_layers(session: InferenceSession, is_tree: bool, weights: Mapping[str, Array]) -> Model:
    """The graph of six layers."""
    uint32, int64 = DType.uint32, DType.int64
    own = [
        typed(DType.float32, "rows", HIDDEN),
        typed(DType.float32, 2048, WIDTH),
        typed(uint32, "offsets"),
        typed(DType.float32, "rows", HEADS, EXTENT),
        typed(uint32, 1, "rows"),
        typed(int64, "path"),
        typed(uint32, "path_offsets"),
    ]
    blocks = BufferType(DType.float32, ["pages", 2, LAYERS, PAGE, KEY_HEADS, WIDTH], device=HOST)
    cached = [
        typed(uint32, "batch"),
        typed(uint32, "batch", "max_pages"),
        typed(uint32, 1),
        typed(uint32, 1),
        typed(int64, 1),
        typed(int64, 4),
    ]
    with Graph(f"layers, tree {is_tree}", input_types=[*own, blocks, *cached]) as graph:
        tensors = [value.tensor for value in graph.inputs[: len(own)]]
        lengths, table, prompt, longest, stride, metadata = (
            value.tensor for value in graph.inputs[len(own) + 1 :]
        )
        cache = PagedCacheValues(
            kv_blocks=graph.inputs[len(own)].buffer,
            cache_lengths=lengths,
            lookup_table=table,
            page_stride=stride,
            max_prompt_length=prompt,
            max_cache_length=longest,
            attention_dispatch_metadata=metadata,
        )
        graph.output(layers(is_tree)(cache, *tensors))
    return session.load(graph, weights_registry=dict(weights))


def compile_head(session: InferenceSession, weight: Array) -> Model:
    """The graph of the head and the best token of each row."""
    with Graph("head", input_types=[typed(DType.float32, "rows", HIDDEN)]) as graph:
        logits = product(graph.inputs[0].tensor, "head", (VOCAB, HIDDEN))
        graph.output(ops.argmax(logits, axis=-1))
    return session.load(graph, weights_registry={"head": weight})


def layer_inputs(case: Case, context: int, rng: np.random.Generator) -> list[Buffer]:
    """Everything that six layers take, behind so many cached tokens."""
    rows, pages = case.rows, -(-(context + case.rows) // PAGE)
    depths = [len(seen) - 1 for seen in ancestors()][:rows]
    blocks = rng.standard_normal((pages, 2, LAYERS, PAGE, KEY_HEADS, WIDTH), np.float32) / 2
    lengths = [np.array([length], np.uint32) for length in (context, rows, context + rows)]
    arrays: list[Array] = [
        rng.standard_normal((rows, HIDDEN), np.float32),
        rng.standard_normal((2048, WIDTH), np.float32) / 2,
        np.array([0, rows], np.uint32),
        bias(case),
        np.array([[context + depth for depth in depths]], np.uint32),
        np.array(PATH),
        np.array([0, len(PATH)], np.uint32),
        blocks,
        lengths[0],
        np.arange(pages, dtype=np.uint32)[None],
        *lengths[1:],
        np.array([2 * LAYERS * PAGE * KEY_HEADS * WIDTH]),
        np.array([1, rows, 1, context + rows]),
    ]
    return [Buffer.from_numpy(np.ascontiguousarray(array)) for array in arrays]


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--runs", type=click.IntRange(min=1), default=250, help="Of each case, in turn.")
@click.option("--context", "contexts", type=int, multiple=True, default=[200, 1000])
def main(runs: int, contexts: tuple[int, ...]) -> None:
    """Prints milliseconds of a whole target: the fastest run of each part, and the median."""
    rng, session = np.random.default_rng(0), InferenceSession(devices=[CPU()])
    weights = {
        f"{name}{number}": rng.standard_normal(shape, np.float32) / 50
        for number in range(LAYERS)
        for name, shape in SHAPES.items()
    }
    models = {tree: compile_layers(session, tree, weights) for tree in (False, True)}
    head = compile_head(session, rng.standard_normal((VOCAB, HIDDEN), np.float32) / 50)
    given: dict[tuple[str, Any], tuple[Model, list[Buffer]]] = {}
    for case in CASES:
        x = rng.standard_normal((case.rows, HIDDEN), np.float32)
        given["head", case] = head, [Buffer.from_numpy(x)]
        for context in contexts:
            given[f"{context}", case] = models[case.is_tree], layer_inputs(case, context, rng)
    times: dict[Any, list[float]] = {key: [] for key in given}
    for _ in range(runs):
        for key, (model, inputs) in given.items():
            start = time.perf_counter()
            model.execute(*inputs)[0].to_numpy()
            times[key].append(1000 * (time.perf_counter() - start))
    for context in contexts:
        for case in CASES:
            parts = [times[f"{context}", case], times["head", case]]
            best, middle = (
                ALL_LAYERS / LAYERS * kind(parts[0]) + kind(parts[1]) for kind in (min, np.median)
            )
            ms = f"fastest {best:6.1f} ms  median {middle:6.1f} ms"
            click.echo(f"context {context:5}  {case.name:14}  {ms}")


if __name__ == "__main__":
    main()
