"""Weights and pages that a GPU has no room for are refused before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from deepseek_gpus import BLOCKS, on_gpus
from max.dtype import DType
from max.nn.quant_config import QuantConfig
from reference.packed_int4 import write_packed
from safetensors.numpy import load_file
from tiny import TinyPair, tiny_deepseek
from tiny.checkpoint import read

from unispec.checkpoints.tensors import bytes_held
from unispec.engine import EngineConfig
from unispec.engine.device_memory import check_device_memory
from unispec.engine.pipeline_config import make_pipeline_config
from unispec.errors import InputError
from unispec.pipelines.architectures.registry import pipeline_model
from unispec.pipelines.served.memory import ServedMemoryPlanner


def gpu(free: int) -> Any:
    return SimpleNamespace(is_host=False, label="gpu", id=0, stats={"free_memory": free})


def test_what_does_not_fit_is_said_in_bytes(tiny_pair: Callable[[str], TinyPair]) -> None:
    pair = tiny_pair("llama_eagle")
    config = make_pipeline_config(
        EngineConfig(
            model=str(pair.target), draft_model=str(pair.draft), speculative_method="eagle"
        )
    )
    model: Any = pipeline_model(config).model_config_cls
    both = model.initialize(config, max_seq_len=64)
    stacks = {
        name: replace(getattr(both, name), dtype=DType.bfloat16) for name in ("target", "draft")
    }
    for stack in stacks.values():
        stack.devices = [SimpleNamespace(is_cpu=lambda: False)]
    on_gpu: Any = replace(both, **stacks)
    assert pair.draft is not None
    numbers = sum(t.size for folder in (pair.target, pair.draft) for t in read(folder)[1].values())
    inputs = ServedMemoryPlanner(on_gpu).estimate_activation_memory(
        config, config.model.huggingface_config
    )
    assert inputs > 0
    needed = 2 * numbers + inputs
    check_device_memory(config, on_gpu, cache=1000, device=gpu(needed + 1000))
    message = (
        f"{pair.target} needs {2 * numbers / 1e9:.1f} GB for its weights, 30.0 GB for the cache and"
        f" {inputs / 1e9:.1f} GB for what a step is given, and gpu:0 has 20.0 GB free: use a GPU"
        " with more memory, a smaller model, or fewer pages"
    )
    with pytest.raises(InputError) as refused:
        check_device_memory(config, on_gpu, cache=30 * 10**9, device=gpu(20 * 10**9))
    assert message in str(refused.value)
    # Fewer pages are of no use where the weights alone do not fit.
    with pytest.raises(InputError, match=r"a smaller model$"):
        check_device_memory(config, on_gpu, cache=0, device=gpu(2 * numbers))
    with pytest.raises(InputError, match="for what a step is given"):
        check_device_memory(config, on_gpu, cache=0, device=gpu(needed - 1))
    check_device_memory(config, on_gpu, cache=0, device=SimpleNamespace(is_host=True))


def test_fp8_layers_count_a_byte_a_number(tmp_path: Any) -> None:
    """Of a packed checkpoint the numbers, not the words; scales of groups are not kept."""
    folder = tiny_deepseek(tmp_path, **BLOCKS)
    tensors = load_file(folder / "model.safetensors")
    write_packed(folder, 32, lambda name: ".experts." in name and "proj" in name)
    blocks = QuantConfig.blockscaled_fp8(mlp_quantized_layers=[], attn_quantized_layers=[])
    config = on_gpus(folder, fp8=blocks, dtype=DType.bfloat16)
    plain = (".gate.weight", "eh_proj.weight", "embed_tokens.weight", "head.weight")
    expected = sum(
        tensor.size * (1 if tensor.ndim == 2 and not name.endswith(plain) else 2)
        for name, tensor in tensors.items()
    )
    found = bytes_held([folder / "model.safetensors"], width=config.number_bytes)
    assert found == expected
