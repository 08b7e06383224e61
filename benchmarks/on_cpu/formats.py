"""The number formats that are compared."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

__all__ = ["FORMATS", "Format"]

_HEAD_TYPES = (GGMLQuantizationType.Q6_K, GGMLQuantizationType.Q8_0)


@dataclass(frozen=True)
class Format:
    """How the weights are stored."""

    name: str
    label: str
    encoding: str
    """What `unispec --quantization-encoding` calls it."""
    matrices: GGMLQuantizationType
    """Of the layers."""
    file_type: LlamaFileType

    @property
    def is_quantised(self) -> bool:
        """Whether its weights come in blocks."""
        return block_size(self.matrices) > 1

    def fits(self, columns: int) -> bool:
        """Whether a row of a matrix consists of whole blocks."""
        return columns % block_size(self.matrices) == 0

    def head(self, columns: int) -> GGMLQuantizationType:
        """The type that llama.cpp's quantiser gives to a tied embedding.

        With 4 bits a weight that is Q6_K, or Q8_0 where a row has no whole blocks of it.
        """
        if self.matrices not in (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_K):
            return self.matrices
        return next(kind for kind in _HEAD_TYPES if columns % block_size(kind) == 0)


def block_size(kind: GGMLQuantizationType) -> int:
    """How many weights a block has."""
    return GGML_QUANT_SIZES[kind][0]


FORMATS = {
    form.name: form
    for form in (
        Format("f32", "F32", "float32", GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
        Format("bf16", "BF16", "bfloat16", GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
        Format("q8_0", "Q8_0", "q8_0", GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
        Format("q4_0", "Q4_0", "q4_0", GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
        Format("q4_k", "Q4_K", "q4_k", GGMLQuantizationType.Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
    )
}
