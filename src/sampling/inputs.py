"""The sampling parameters of a batch as graph inputs."""

from __future__ import annotations

from dataclasses import dataclass, fields

from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue

__all__ = ["SamplingInputs"]


@dataclass(frozen=True)
class SamplingInputs:
    """Graph values of the sampling parameters; the field order is the graph's input order.

    B is the batch size, K the number of draft tokens to verify, V the vocabulary.
    """

    seed: TensorValue
    """uint64 `[B]`, the request's seed."""
    temperature: TensorValue
    """float32 `[B]`; 0 is greedy."""
    max_temperature: TensorValue
    """float32 scalar on the CPU: the largest of the batch; 0 skips all but the argmax."""
    top_k: TensorValue
    """int64 `[B]`; 0 or less is no limit."""
    max_k: TensorValue
    """int64 scalar on the CPU: the largest `top_k` of the batch; 0 skips the search."""
    top_p: TensorValue
    """float32 `[B]`; 1 is no limit."""
    min_top_p: TensorValue
    """float32 scalar on the CPU: the smallest `top_p` of the batch; 1 skips the search."""
    min_p: TensorValue
    """float32 `[B]`; 0 is no limit."""
    presence_penalty: TensorValue
    """float32 `[B]`; 0 is none."""
    frequency_penalty: TensorValue
    """float32 `[B]`; 0 is none."""
    repetition_penalty: TensorValue
    """float32 `[B]`; 1 is none."""
    num_penalised: TensorValue
    """int64 scalar on the CPU: how many rows have a penalty; 0 skips them."""
    token_counts: TensorValue
    """int32 `[B, V]`: how often a token was generated; -1: only in the prompt."""
    logit_bias: TensorValue
    """float32 `[B, V]`, added to the logits."""
    token_bitmask: TensorValue
    """int32 `[B, K + 1, ceil(V / 32)]`: bit i of word w set allows token 32 w + i."""

    @classmethod
    def types(cls, device: DeviceRef, vocab_size: int) -> list[TensorType]:
        """Graph input types in field order, with dims `batch` and `num_positions` (K + 1).

        Args:
            device: where the graph runs.
            vocab_size: V.
        """
        cpu = DeviceRef.CPU()
        per_row = {
            "seed": DType.uint64,
            "top_k": DType.int64,
        }
        special = {
            "max_temperature": TensorType(DType.float32, [], device=cpu),
            "num_penalised": TensorType(DType.int64, [], device=cpu),
            "max_k": TensorType(DType.int64, [], device=cpu),
            "min_top_p": TensorType(DType.float32, [], device=cpu),
            "token_counts": TensorType(DType.int32, ["batch", vocab_size], device=device),
            "logit_bias": TensorType(DType.float32, ["batch", vocab_size], device=device),
            "token_bitmask": cls.mask_type(device, vocab_size),
        }
        return [
            special.get(field.name)
            or TensorType(per_row.get(field.name, DType.float32), ["batch"], device=device)
            for field in fields(cls)
        ]

    @staticmethod
    def mask_type(device: DeviceRef, vocab_size: int) -> TensorType:
        """Graph input type of `token_bitmask`.

        Args:
            device: where the graph runs.
            vocab_size: V.
        """
        words = -(-vocab_size // 32)
        return TensorType(DType.int32, ["batch", "num_positions", words], device=device)
