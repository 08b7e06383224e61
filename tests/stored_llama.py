"""A tiny Llama whose layers are stored in different forms, as a GGUF file and dequantised."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf_files import write_gguf
from tiny.checkpoint import read, write
from tiny.llama import agreeing_llama
from transformers import AutoModelForCausalLM

from unispec.checkpoints.gguf import read_gguf
from unispec.checkpoints.quantise import quantise
from unispec.checkpoints.stored import StoredMatrix

__all__ = ["FORMS", "stored_llama"]

FORMS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")
"""Of one layer each; of the last two the value projection has the other one, as files mix them."""
EMBEDDING, HEAD = "Q8_0", "Q6_K"

Bytes = npt.NDArray[Any]


def stored_llama(folder: Path) -> tuple[Path, Path]:
    """Writes the GGUF file, and a folder of the same numbers in float32.

    It is an `agreeing_llama`, so an `agreeing_eagle` drafts well for it.
    """
    shape = {"hidden_size": 256, "heads": 8, "head_dim": 32, "vocab_size": 262}
    floats = agreeing_llama(folder / "floats", layers=len(FORMS), **shape)
    model = AutoModelForCausalLM.from_pretrained(floats)
    file = write_gguf(folder / "mixed.gguf", model, kinds=_kind, to_bytes=_blocks)
    config, _ = read(floats)
    tensors = {name: np.asarray(one) for name, one in read_gguf(file).tensors.items()}
    return file, write(folder / "dequantised", config, tensors)


def _kind(name: str) -> GGMLQuantizationType:
    if name == "model.embed_tokens.weight":
        return GGMLQuantizationType[EMBEDDING]
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    form = HEAD if layer is None else FORMS[int(layer[1])]
    if "v_proj" in name and form in ("Q4_K", "Q6_K"):
        form = "Q6_K" if form == "Q4_K" else "Q4_K"
    return GGMLQuantizationType[form]


def _blocks(tensor: npt.NDArray[np.float32], kind: GGMLQuantizationType) -> Bytes:
    if kind not in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K):
        return gguf.quantize(tensor, kind)
    stored = quantise(tensor, kind.name.lower(), "test")
    assert isinstance(stored, StoredMatrix)
    return stored.blocks
