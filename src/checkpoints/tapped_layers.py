"""Which layers of its target an EAGLE-3 draft reads that does not say; imports nothing heavy."""

from __future__ import annotations

__all__ = ["default_layer_ids"]


def default_layer_ids(num_layers: int) -> list[int]:
    """Layers, from 0, whose outputs are read: those before layers 2, n / 2 and n - 3.

    SafeAILab/EAGLE `modeling_llama_kv.py`; vLLM and SGLang `llama.py`. In a target of less than
    five layers some coincide, as NVIDIA's Model Optimizer has it.

    Args:
        num_layers: n, the target's.
    """
    ids = {min(1, num_layers - 1), max(0, num_layers // 2 - 1), max(0, num_layers - 4)}
    return sorted(ids)
