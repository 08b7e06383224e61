"""The packaged DFlash draft as llama.cpp reads one.

Of the packaged drafts it is the one that llama.cpp can run: it has neither the norms before `fc`
nor the normed output of the EAGLE-3 one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from unispec.checkpoints.demo import demo_draft_folder

from .formats import Format
from .gguf_files import packaged_file
from .gguf_writing import copy_metadata, finish, made_once

__all__ = ["dflash_gguf"]

_NAMES: Final = {
    "fc": "fc",
    "hidden_norm": "enc.output_norm",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def dflash_gguf(form: Format) -> Path:
    """The draft for a target in this format: in Q8_0 for a quantised one, else as it is."""
    kind = GGMLQuantizationType.Q8_0 if form.is_quantised else GGMLQuantizationType.F16
    return made_once(f"SmolLM2-135M-DFlash-{kind.name}", lambda file: _write(file, kind))


def _write(file: Path, kind: GGMLQuantizationType) -> None:
    folder = demo_draft_folder("dflash")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    target = GGUFReader(packaged_file())
    writer = GGUFWriter(file, "dflash")
    copy_metadata(target, writer, prefix="tokenizer.")
    _add_config(writer, config)
    offsets = tensors.pop("d2t")
    token_ids = np.arange(len(offsets)) + offsets
    writer.add_tensor("d2t", token_ids.astype(np.int64))
    # Its head is the target's, of the tokens that it can propose.
    (embedding,) = [tensor for tensor in target.tensors if tensor.name == "token_embd.weight"]
    head = dequantize(embedding.data, embedding.tensor_type)[token_ids]
    _add(writer, "output.weight", head, kind)
    for name, values in tensors.items():
        _add(writer, _gguf_name(name), values.astype(np.float32), kind)
    finish(writer)


def _add_config(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_uint32("dflash.block_size", config["block_size"])
    of_dflash = config["dflash_config"]
    writer.add_uint32("tokenizer.ggml.mask_token_id", of_dflash["mask_token_id"])
    # llama.cpp names the layer whose input it is.
    layers = [layer + 1 for layer in of_dflash["target_layer_ids"]]
    writer.add_array("dflash.target_layers", layers)


def _gguf_name(name: str) -> str:
    """`layers.0.mlp.up_proj.weight` is `blk.0.ffn_up.weight`."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{_NAMES[stem]}.weight"
    _, index, rest = stem.split(".", 2)
    return f"blk.{index}.{_NAMES[rest]}.weight"


def _add(
    writer: GGUFWriter, name: str, values: npt.NDArray[np.float32], kind: GGMLQuantizationType
) -> None:
    """llama.cpp wants the norms in F32."""
    kind = kind if values.ndim == 2 else GGMLQuantizationType.F32
    writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
