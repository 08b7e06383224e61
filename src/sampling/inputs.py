"""The list of sampling parameters: of one request, and of a batch as a graph takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue

__all__ = [
    "BITMASK",
    "PER_ROW",
    "SAMPLING_PARAMETERS",
    "RowSampling",
    "SamplingFields",
    "SamplingInputs",
    "SamplingParameter",
    "sampling_types",
]

T = TypeVar("T")

BITMASK: Final = "token_bitmask"
"""The one parameter that the host writes bit by bit."""

_ROW: Final = ("batch",)
_PLANE: Final = ("batch", "vocab")


@dataclass
class RowSampling:
    """One request's sampling parameters and what it has seen, in the graph's terms.

    The arrays stay with the request; a step only copies those of rows that use them.
    """

    seed: int
    """Taken modulo 2**64."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 or less is no limit, and is kept as 0."""
    top_p: float = 1.0
    """1 is no limit."""
    min_p: float = 0.0
    """0 is no limit."""
    presence_penalty: float = 0.0
    """0 is none."""
    frequency_penalty: float = 0.0
    """0 is none."""
    repetition_penalty: float = 1.0
    """1 is none."""
    token_counts: npt.NDArray[np.int32] | None = None
    """`[V]`, only where a penalty is on: generated count, -1 for prompt tokens."""
    logit_bias: npt.NDArray[np.float32] | None = None
    """`[V]`, only where the request biases tokens."""
    num_logprobs: int = 0
    """0: nobody asks for log probabilities; 1 + n: for those of each token of the answer and of
    the n most probable tokens."""

    def __post_init__(self) -> None:
        self.seed = int(self.seed) & 2**64 - 1
        self.top_k = max(self.top_k, 0)

    def count(self, token: int) -> None:
        """Counts one generated token."""
        if self.token_counts is not None:
            self.token_counts[token] = max(int(self.token_counts[token]), 0) + 1


@dataclass(frozen=True)
class SamplingParameter:
    """What a graph takes of one sampling parameter."""

    dtype: DType
    """Of its elements."""
    dims: tuple[str, ...]
    """Its shape by names; a scalar is on the CPU, all others are on the graph's device."""
    of_batch: Callable[[Sequence[RowSampling]], float] | None = None
    """Of a scalar: its value for these rows."""


def _declare(*declared: Any) -> dict[str, SamplingParameter]:
    return {"parameter": SamplingParameter(*declared)}


_UNSET: Any = None  # of any `T`


@dataclass(kw_only=True)
class SamplingFields(Generic[T]):
    """The sampling parameters of a batch: graph values, or the memory that a step is given.

    The order of the fields is that of the graph's inputs. B is the batch size, K the number of
    draft tokens to verify, V the vocabulary.
    """

    seed: T = field(default=_UNSET, metadata=_declare(DType.uint64, _ROW))
    """uint64 `[B]`, the request's seed."""
    temperature: T = field(default=_UNSET, metadata=_declare(DType.float32, _ROW))
    """float32 `[B]`; 0 is greedy."""
    max_temperature: T = field(
        default=_UNSET,
        metadata=_declare(
            DType.float32, (), lambda rows: max((row.temperature for row in rows), default=0)
        ),
    )
    """float32 scalar on the CPU: the largest of the batch; 0 skips all but the argmax."""
    top_k: T = field(default=_UNSET, metadata=_declare(DType.int64, _ROW))
    """int64 `[B]`; 0 or less is no limit."""
    max_k: T = field(
        default=_UNSET,
        metadata=_declare(
            DType.int64, (), lambda rows: max((row.top_k for row in rows), default=0)
        ),
    )
    """int64 scalar on the CPU: the largest `top_k` of the batch; 0 skips the search."""
    top_p: T = field(default=_UNSET, metadata=_declare(DType.float32, _ROW))
    """float32 `[B]`; 1 is no limit."""
    min_top_p: T = field(
        default=_UNSET,
        metadata=_declare(
            DType.float32, (), lambda rows: min((row.top_p for row in rows), default=1)
        ),
    )
    """float32 scalar on the CPU: the smallest `top_p` of the batch; 1 skips the search."""
    min_p: T = field(default=_UNSET, metadata=_declare(DType.float32, _ROW))
    """float32 `[B]`; 0 is no limit."""
    presence_penalty: T = field(default=_UNSET, metadata=_declare(DType.float32, _ROW))
    """float32 `[B]`; 0 is none."""
    frequency_penalty: T = field(default=_UNSET, metadata=_declare(DType.float32, _ROW))
    """float32 `[B]`; 0 is none."""
    repetition_penalty: T = field(default=_UNSET, metadata=_declare(DType.float32, _ROW))
    """float32 `[B]`; 1 is none."""
    num_penalised: T = field(
        default=_UNSET,
        metadata=_declare(
            DType.int64, (), lambda rows: sum(row.token_counts is not None for row in rows)
        ),
    )
    """int64 scalar on the CPU: how many rows have a penalty; 0 skips them."""
    token_counts: T = field(default=_UNSET, metadata=_declare(DType.int32, _PLANE))
    """int32 `[B, V]`: how often a token was generated; -1: only in the prompt."""
    logit_bias: T = field(default=_UNSET, metadata=_declare(DType.float32, _PLANE))
    """float32 `[B, V]`, added to the logits."""
    token_bitmask: T = field(
        default=_UNSET, metadata=_declare(DType.int32, ("batch", "num_positions", "words"))
    )
    """int32 `[B, K + 1, ceil(V / 32)]`: bit i of word w set allows token 32 w + i."""
    num_logprobs: T = field(
        default=_UNSET,
        metadata=_declare(
            DType.int64, (), lambda rows: max((row.num_logprobs for row in rows), default=0)
        ),
    )
    """int64 scalar on the CPU: the largest of the batch; 0 skips all log probabilities, 1 those of
    the most probable tokens."""


@dataclass(kw_only=True)
class SamplingInputs(SamplingFields[TensorValue]):
    """The sampling parameters of a batch as graph values."""


SAMPLING_PARAMETERS: Final[dict[str, SamplingParameter]] = {
    declared.name: declared.metadata["parameter"] for declared in fields(SamplingFields)
}
"""Each parameter by its name, in the order of the graph's inputs."""

PER_ROW: Final = tuple(
    name for name, parameter in SAMPLING_PARAMETERS.items() if parameter.dims == _ROW
)
"""Those with one number a row: fields of `RowSampling` and, under the same names, of MAX's
`SamplingParams`."""


def sampling_types(device: DeviceRef, vocab_size: int) -> dict[str, TensorType]:
    """Graph input types by name, in order."""
    sizes = {"vocab": vocab_size, "words": -(-vocab_size // 32)}
    return {
        name: TensorType(
            parameter.dtype,
            [sizes.get(dim, dim) for dim in parameter.dims],
            device=device if parameter.dims else DeviceRef.CPU(),
        )
        for name, parameter in SAMPLING_PARAMETERS.items()
    }
