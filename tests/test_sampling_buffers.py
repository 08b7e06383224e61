"""What reaches a graph on another device: never what an earlier step had there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from max.driver import CPU, Buffer
from max.graph import DeviceRef
from max.pipelines.context import SamplingParams

from unispec.pipelines.architectures.unified_dflash_kimi_k25.inputs import UNIFIED_ORDER
from unispec.pipelines.runtime.rows import make_row
from unispec.pipelines.speculative.step import INPUT_ORDER
from unispec.pipelines.targets.deepseek.inputs import DEEPSEEK_ORDER
from unispec.pipelines.targets.kimi.inputs import KIMI_ORDER
from unispec.sampling import buffers
from unispec.sampling.buffers import SamplingBuffers
from unispec.sampling.inputs import PER_ROW, SAMPLING_PARAMETERS, RowSampling, sampling_types

VOCAB = 70  # three words of a mask, the last one not full
ROWS, POSITIONS = 6, 4


class OtherDevice:
    """Stands in for a GPU: it has memory of its own."""

    is_host = False


class Copied:
    """Stands in for a buffer: what the graph reads there is what was copied there."""

    made = 0
    """Bytes of device memory in all."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def to(self, device: OtherDevice) -> Copied:
        Copied.made += self.array.nbytes
        return Copied(self.array.copy())

    def __getitem__(self, index: Any) -> Copied:
        return Copied(self.array[index])

    def view(self, dtype: Any, shape: Sequence[int]) -> Copied:
        return Copied(self.array.reshape(shape))


def copy_all(targets: Sequence[Copied], sources: Sequence[Copied]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.array[...] = source.array


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> SamplingBuffers:
    monkeypatch.setattr(buffers, "Buffer", type("_", (), {"from_numpy": staticmethod(Copied)}))
    monkeypatch.setattr(buffers, "batch_inplace_copy", copy_all)
    Copied.made = 0
    return SamplingBuffers(ROWS, VOCAB, POSITIONS, OtherDevice())  # type: ignore[arg-type]


def random_row(rng: np.random.Generator) -> RowSampling:
    row = RowSampling(
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
        temperature=float(rng.choice([0.0, 0.5, 1.5])),
        top_k=int(rng.integers(0, 9)),
        top_p=float(rng.choice([0.25, 1.0])),
        min_p=float(rng.choice([0.0, 0.125])),
        presence_penalty=float(rng.choice([0.0, 0.5])),
        frequency_penalty=float(rng.choice([0.0, -0.5])),
        repetition_penalty=float(rng.choice([1.0, 1.25])),
    )
    if rng.random() < 0.3:
        row.token_counts = rng.integers(-1, 5, VOCAB).astype(np.int32)
    if rng.random() < 0.3:
        row.logit_bias = rng.normal(size=VOCAB).astype(np.float32)
    row.num_logprobs = int(rng.choice([0, 0, 1, 6]))
    return row


def plainly(rows: Sequence[RowSampling], bitmask: npt.NDArray[np.int32]) -> dict[str, Any]:
    """The inputs of a batch, made anew."""
    zero = np.zeros(VOCAB)
    per_row = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty")
    return {
        **{name: [getattr(row, name) for row in rows] for name in per_row},
        "seed": np.array([row.seed for row in rows], np.uint64),
        "repetition_penalty": [row.repetition_penalty for row in rows],
        "max_temperature": max(row.temperature for row in rows),
        "max_k": max(row.top_k for row in rows),
        "min_top_p": min(row.top_p for row in rows),
        "num_penalised": len([row for row in rows if row.token_counts is not None]),
        "token_counts": [zero if row.token_counts is None else row.token_counts for row in rows],
        "logit_bias": [zero if row.logit_bias is None else row.logit_bias for row in rows],
        "token_bitmask": bitmask,
        "num_logprobs": max(row.num_logprobs for row in rows),
    }


def assert_right(sampling: SamplingBuffers, rows: Sequence[RowSampling], mask: int) -> None:
    """Fills a step whose masks are `mask` in every word, and compares all that is sent."""
    bitmask = sampling.bitmask(len(rows), POSITIONS)
    assert (bitmask == -1).all()
    bitmask[...] = mask
    expected = plainly(rows, bitmask.copy())
    sent = sampling.fill(rows, bitmask)
    assert list(sent) == list(SAMPLING_PARAMETERS)
    for name, buffer in sent.items():
        array = buffer.array if isinstance(buffer, Copied) else buffer.to_numpy()
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_a_batch_of_any_size_gets_its_own_parameters_on_a_gpu(on_a_gpu: SamplingBuffers) -> None:
    rng = np.random.default_rng(0)
    reserved = Copied.made
    for step in range(500):
        assert_right(on_a_gpu, [random_row(rng) for _ in range(rng.integers(1, ROWS + 1))], step)
    assert Copied.made == reserved


def test_a_batch_of_any_size_gets_its_own_parameters_on_a_cpu() -> None:
    rng = np.random.default_rng(1)
    sampling = SamplingBuffers(ROWS, VOCAB, POSITIONS, CPU())
    for step in range(200):
        assert_right(sampling, [random_row(rng) for _ in range(rng.integers(1, ROWS + 1))], step)


def test_a_bias_does_not_come_back_with_a_batch_of_its_size(on_a_gpu: SamplingBuffers) -> None:
    biased, plain = RowSampling(1), RowSampling(2)
    biased.logit_bias = np.arange(VOCAB, dtype=np.float32)
    for rows in ([biased, plain], [plain], [plain], [plain, plain], [plain, biased], [plain] * 3):
        assert_right(on_a_gpu, rows, 0)


def test_the_stand_in_is_needed_on_this_machine() -> None:
    """A CPU reads the host's own arrays, so that staleness cannot show there."""
    assert Buffer.from_numpy(np.zeros(1)).device.is_host


def test_a_seed_is_taken_modulo_its_64_bits() -> None:
    assert RowSampling(2**64 + 5).seed == 5
    assert RowSampling(-1).seed == 2**64 - 1


@pytest.mark.parametrize("positions", [1, POSITIONS])
def test_what_is_sent_is_what_the_graph_declares(positions: int) -> None:
    sampling = SamplingBuffers(ROWS, VOCAB, POSITIONS, CPU())
    rows = [RowSampling(1), RowSampling(2)]
    sent = sampling.fill(rows, sampling.bitmask(len(rows), positions))
    declared = sampling_types(DeviceRef.CPU(), VOCAB)
    sizes = {"batch": len(rows), "num_positions": positions}
    assert {name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in sent.items()} == {
        name: (of.dtype, tuple(sizes.get(str(dim)) or int(dim) for dim in of.shape))
        for name, of in declared.items()
    }


@pytest.mark.parametrize("order", [INPUT_ORDER, DEEPSEEK_ORDER, KIMI_ORDER, UNIFIED_ORDER])
def test_every_graph_takes_each_parameter_once(order: Sequence[str]) -> None:
    assert sorted(set(order) & set(SAMPLING_PARAMETERS)) == sorted(SAMPLING_PARAMETERS)
    assert len(set(order)) == len(order)


def test_every_number_of_a_row_is_one_of_max() -> None:
    """A request's values reach the graph by their names."""
    given = SamplingParams(**dict.fromkeys(PER_ROW, 1))
    row = make_row(given, [0], VOCAB).sampling
    assert [getattr(row, name) for name in PER_ROW] == [1] * len(PER_ROW)
