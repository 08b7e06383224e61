"""An EAGLE-3 draft in torch, in any of the forms in which such drafts are published.

Row ``i`` of the draft takes (embedding of token ``i + 1``, a feature of token ``i``) at position
``i``. ``fc`` makes the feature of the target's states before three of its layers; behind the tokens
that the target has read, the draft's own output stands in. Forward pass and formats: EAGLE-3, arXiv
2503.01840, and its authors' ``cnets.py``; the options as in vllm-project/speculators.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .eagle import EagleReference
from .target import TargetReference

__all__ = ["Eagle3Reference", "states_before"]


def states_before(config: dict[str, Any], num_layers: int) -> list[int]:
    """The layers before which the target's states are read; ``num_layers`` is behind the last."""
    nested = config.get("eagle_config") or {}
    key = "eagle_aux_hidden_state_layer_ids"
    ids = nested.get(key) or config.get(key)
    if not ids:
        # In a target of less than five layers some coincide.
        return sorted({min(2, num_layers), max(1, num_layers // 2), max(1, num_layers - 3)})
    counts_outputs = "speculators_model_type" not in config and min(ids) == 1
    return [k + 1 for k in ids] if counts_outputs else list(ids)


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig, width: int, *, qk_norm: bool, qkv_bias: bool) -> None:
        super().__init__()
        self.head_dim, hidden = config.head_dim, config.hidden_size
        q_width = config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(width, q_width, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(q_width, hidden, bias=False)
        if qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        self.normed = qk_norm

    def forward(self, rows: Tensor, angles: Tensor, cache: DynamicCache, index: int) -> Tensor:
        """What rows [R, width], behind those in the cache, take from all up to themselves."""

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)  # [heads, R, D]

        queries, keys = heads(self.q_proj(rows)), heads(self.k_proj(rows))
        if self.normed:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        cos, sin = angles.cos(), angles.sin()  # [R, D/2] each

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        keys, values = cache.update(turned(keys)[None], heads(self.v_proj(rows))[None], index)
        keys, values = (t[0].repeat_interleave(self.group, dim=0) for t in (keys, values))
        scores = turned(queries) @ keys.transpose(1, 2) * self.head_dim**-0.5  # [heads, R, L]
        length, count = keys.shape[1], len(rows)
        future = torch.arange(length) > torch.arange(length - count, length)[:, None]
        seen = scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ values
        output: Tensor = self.o_proj(seen.transpose(0, 1).flatten(1))
        return output


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig, index: int, **options: bool) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.index = index
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)
        width = hidden
        if index == 0:
            self.hidden_norm = nn.RMSNorm(hidden, eps)
            width = 2 * hidden
        self.self_attn = _Attention(config, width, **options)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, config.intermediate_size, bias=False),
                "up_proj": nn.Linear(hidden, config.intermediate_size, bias=False),
                "down_proj": nn.Linear(config.intermediate_size, hidden, bias=False),
            }
        )

    def forward(
        self, residual: Tensor, rows: Tensor, angles: Tensor, cache: DynamicCache
    ) -> Tensor:
        """What attention, which reads ``rows``, and the MLP add to ``residual`` [R, H]."""
        residual = residual + self.self_attn(rows, angles, cache, self.index)
        x = self.post_attention_layernorm(residual)
        inner = nn.functional.silu(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x)
        output: Tensor = residual + self.mlp["down_proj"](inner)
        return output


class _Draft(nn.Module):
    """The tensors of a draft checkpoint, and the pass over rows."""

    def __init__(self, config: LlamaConfig, flags: dict[str, bool], taps: list[int]) -> None:
        super().__init__()
        hidden, eps, self.flags = config.hidden_size, config.rms_norm_eps, flags
        width = sum(taps)
        self.fc = nn.Linear(width, hidden, bias=flags["fc_bias"])
        if flags["norm_before_fc"]:
            self.input_norm = nn.RMSNorm(width, eps)
        if flags["fc_norm"]:
            self.fc_norm = nn.ModuleList(nn.RMSNorm(tap, eps) for tap in taps)
        self.layers = nn.ModuleList(
            _Layer(config, index, qk_norm=flags["qk_norm"], qkv_bias=flags["qkv_bias"])
            for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(hidden, eps)
        self.rotary = LlamaRotaryEmbedding(config)

    def enter(self, taps: list[Tensor]) -> Tensor:
        """The feature [T, H] of the target's states [T, H] each."""
        if self.flags["fc_norm"]:
            taps = [norm(tap) for norm, tap in zip(self.fc_norm, taps, strict=True)]
        joined = torch.cat(taps, dim=-1)
        feature: Tensor = self.fc(
            self.input_norm(joined) if self.flags["norm_before_fc"] else joined
        )
        return feature

    def forward(self, embeddings: Tensor, features: Tensor, cache: DynamicCache) -> Tensor:
        """[R, H] and [R, H] of the rows after those in ``cache``, to their outputs [R, H]."""
        start = cache.get_seq_length()
        positions = torch.arange(start, start + len(embeddings)).float()
        angles = torch.outer(positions, self.rotary.inv_freq)  # [R, D/2]
        first: Any = self.layers[0]
        normed = first.hidden_norm(features)
        pair = torch.cat([first.input_layernorm(embeddings), normed], dim=-1)  # [R, 2 H]
        residual = normed if self.flags["norm_before_residual"] else features
        x: Tensor = first(residual, pair, angles, cache)
        for layer in self.layers[1:]:
            x = layer(x, layer.input_layernorm(x), angles, cache)
        output: Tensor = self.norm(x) if self.flags["norm_output"] else x
        return output


class Eagle3Reference(EagleReference):
    """An EAGLE-3 draft checkpoint together with the target that it was made for.

    Proposes and simulates as ``EagleReference``. Embedding and head are the checkpoint's, or the
    target's where it has none.
    """

    def __init__(self, draft_folder: Path | str, target: TargetReference) -> None:
        """Loads the draft in float32; unknown or missing tensors raise ``RuntimeError``."""
        self.target = target
        folder = Path(draft_folder)
        stated = json.loads((folder / "config.json").read_text())
        layer = stated.get("transformer_layer_config") or stated
        self.config = LlamaConfig(**layer | {"architectures": None, "model_type": "llama"})
        self.before = states_before(stated, target.model.config.num_hidden_layers)
        tensors = {
            name.replace("midlayer.", "layers.0."): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        tensors.pop("t2d", None)
        offsets = tensors.pop("d2t", None)  # [N] int64
        self.target_ids = (
            torch.arange(self.config.vocab_size)
            if offsets is None
            else torch.arange(len(offsets)) + offsets
        )  # [N]
        embedding = tensors.pop("embed_tokens.weight", None)
        head = tensors.pop("lm_head.weight", None)
        self.embedding = target.embedding if embedding is None else embedding.float()
        self.head = target.head[self.target_ids] if head is None else head.float()
        names = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
        flags = {name: bool(stated.get(name)) for name in names}
        flags["qk_norm"] = "layers.0.self_attn.q_norm.weight" in tensors
        flags["qkv_bias"] = "layers.0.self_attn.q_proj.bias" in tensors
        flags["fc_bias"] = "fc.bias" in tensors
        self._draft: Any = _Draft(
            self.config, flags, [target.embedding.shape[1]] * len(self.before)
        ).eval()
        self._draft.load_state_dict({name: t.float() for name, t in tensors.items()})

    def read(self, ids: Sequence[int], cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """See ``EagleReference``; the features have passed ``fc``."""
        layers = self.target.model.get_decoder().layers
        states: dict[int, Tensor] = {}

        def before(layer: Any, args: tuple[Any, ...]) -> None:
            states[layer.self_attn.layer_idx] = args[0][0]

        def behind(layer: Any, args: tuple[Any, ...], output: Any) -> None:
            states[len(layers)] = output[0]

        with ExitStack() as hooks, torch.inference_mode():
            for layer in layers:
                hooks.callback(layer.register_forward_pre_hook(before).remove)
            hooks.callback(layers[-1].register_forward_hook(behind).remove)
            hidden = self.target.extend(ids, cache)
            return hidden, self._draft.enter([states[k] for k in self.before])

    def logits(self, output: Tensor) -> Tensor:
        """The logits [..., N] of outputs [..., H]."""
        draft = self._draft
        with torch.inference_mode():
            normed = output if draft.flags["norm_output"] else draft.norm(output)
            found: Tensor = normed @ self.head.T
        return found
