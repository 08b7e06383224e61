"""DeepSeek-V3's multi-token prediction layer in torch, as a draft of its own target.

Row ``i`` takes the embedding of token ``i + 1`` and the feature of token ``i`` at position ``i``;
its output, after the layer's own norm, predicts token ``i + 2``. The order of ``eh_proj``'s
halves and where norms stand: README_WEIGHTS.md of deepseek-ai/DeepSeek-V3 and SGLang's
``deepseek_nextn.py``. The decoder layer is transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
)

from .block_fp8 import dequantised_tensors
from .eagle import EagleReference
from .target import TargetReference

__all__ = ["MtpReference"]


class MtpReference(EagleReference):
    """The MTP layer of a checkpoint together with the checkpoint's target.

    Proposes and simulates as ``EagleReference``.
    """

    def __init__(self, folder: Path | str, target: TargetReference) -> None:
        """Loads the layer in float32; missing tensors raise torch's ``RuntimeError``."""
        self.target = target
        self.config = DeepseekV3Config.from_pretrained(folder, attn_implementation="eager")
        self.target_ids = torch.arange(self.config.vocab_size)
        self.embedding = target.embedding
        self.head = target.head
        index = self.config.num_hidden_layers
        stored = dequantised_tensors(Path(folder))
        prefix = f"model.layers.{index}."
        tensors = {
            name.removeprefix(prefix): tensor.float()
            for name, tensor in stored.items()
            if name.startswith(prefix)
        }
        self._draft = _Draft(self.config, index).eval()
        self._draft.load(tensors)


class _Draft(nn.Module):
    """The layer's tensors, and the pass over rows."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_experts = config.n_routed_experts
        self.enorm, self.hnorm, self.norm = (
            DeepseekV3RMSNorm(hidden, eps=config.rms_norm_eps) for _ in range(3)
        )
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.layer = DeepseekV3DecoderLayer(config, index)
        self.layer.self_attn.layer_idx = 0
        self.rotary = DeepseekV3RotaryEmbedding(config)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the tensors under their names in the checkpoint, without the layer's prefix."""
        own = {name: tensors[f"{name}.weight"] for name in ("enorm", "hnorm", "eh_proj")}
        own["norm"] = tensors["shared_head.norm.weight"]
        state = {f"{name}.weight": tensor for name, tensor in own.items()}
        for name, tensor in tensors.items():
            if (
                name.startswith(("self_attn.", "mlp.", "input_", "post_"))
                and "experts." not in name
            ) or "shared_experts." in name:
                state[f"layer.{name}"] = tensor

        def expert(index: int, projection: str) -> Tensor:
            return tensors[f"mlp.experts.{index}.{projection}.weight"]

        every = range(self.num_experts)
        state["layer.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([expert(e, "gate_proj"), expert(e, "up_proj")]) for e in every]
        )
        state["layer.mlp.experts.down_proj"] = torch.stack([expert(e, "down_proj") for e in every])
        self.load_state_dict(state)

    def forward(self, embeddings: Tensor, features: Tensor, cache: DynamicCache) -> Tensor:
        """[R, H] and [R, H] of the rows after those in ``cache``, to their outputs [R, H]."""
        start, rows = cache.get_seq_length(), embeddings.shape[0]
        positions = torch.arange(start, start + rows)  # [R]
        both = torch.cat([self.enorm(embeddings), self.hnorm(features)], dim=-1)  # [R, 2 H]
        hidden: Tensor = self.eh_proj(both)[None]  # [1, R, H]
        future = torch.arange(start + rows) > positions[:, None]  # [R, start + R]
        mask = torch.zeros(future.shape).masked_fill(future, float("-inf"))
        hidden = self.layer(
            hidden,
            attention_mask=mask[None, None],
            past_key_values=cache,
            use_cache=True,
            position_embeddings=self.rotary(hidden, positions[None]),
        )
        output: Tensor = self.norm(hidden)[0]
        return output
