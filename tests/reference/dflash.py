"""A DFlash draft for Llama targets in torch, and greedy speculative decoding with it.

A block of B slots starts at the position of the target's next token: that token, then B - 1
masks. Slot ``i`` >= 1 predicts the token at its own position; slot 0 predicts nothing. The
context, one row per verified token, is made of the target's hidden states and gives keys and
values to every layer, but no queries. Formats and alignment: DFlash, arXiv 2602.06036.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .eagle import DraftStep
from .target import TargetReference

__all__ = ["DFlashReference"]


def _rotated(rows: Tensor, angles: Tensor) -> Tensor:
    """Turns the pairs (d, d + D/2) of ``rows`` [R, heads, D] by ``angles`` [R, D/2]."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [R, 1, D/2] each
    first, second = rows.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, bias, self.head_dim = config.hidden_size, config.attention_bias, config.head_dim
        q_width = config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, q_width, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_width, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_width, bias=bias)
        self.o_proj = nn.Linear(q_width, hidden, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (-1, self.head_dim))  # [R, heads, D]

    def forward(self, block: Tensor, context: Tensor, angles: Tensor, visible: Tensor) -> Tensor:
        """What the block [B, H] takes from ``context`` [T, H] and from itself.

        Args:
            block: The block's rows after the layer's input norm.
            context: The context's rows, which pass no input norm.
            angles: RoPE's, of context and block [T + B, D/2].
            visible: Which rows each slot may look at [B, T + B].
        """
        rows = torch.cat([context, block])  # [T + B, H]
        queries = _rotated(self.q_norm(self._heads(self.q_proj(block))), angles[len(context) :])
        keys = _rotated(self.k_norm(self._heads(self.k_proj(rows))), angles)
        values = self._heads(self.v_proj(rows))  # [T + B, kv_heads, D]
        keys, values = (t.repeat_interleave(self.group, dim=1) for t in (keys, values))
        scores = torch.einsum("bhd,rhd->hbr", queries, keys) * self.head_dim**-0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)  # [heads, B, T + B]
        seen = torch.einsum("hbr,rhd->bhd", weights, values)  # [B, heads, D]
        output: Tensor = self.o_proj(seen.flatten(1))
        return output


class _MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        output: Tensor = self.down_proj(
            nn.functional.silu(self.gate_proj(rows)) * self.up_proj(rows)
        )
        return output


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _MLP(config)

    def forward(self, block: Tensor, context: Tensor, angles: Tensor, visible: Tensor) -> Tensor:
        """The block [B, H] after this layer."""
        block = block + self.self_attn(self.input_layernorm(block), context, angles, visible)
        output: Tensor = block + self.mlp(self.post_attention_layernorm(block))
        return output


class _Draft(nn.Module):
    """The tensors of a draft checkpoint under their own names, and the pass over a block."""

    def __init__(self, config: LlamaConfig, num_taps: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(num_taps * hidden, hidden, bias=False)
        self.hidden_norm = nn.RMSNorm(hidden, eps)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(hidden, eps)
        self.rotary = LlamaRotaryEmbedding(config)
        layer_types: Sequence[str] = getattr(config, "layer_types", None) or ()
        sliding = [kind == "sliding_attention" for kind in layer_types]
        sliding = sliding or [False] * config.num_hidden_layers
        self.windows = [config.sliding_window if slides else None for slides in sliding]
        if (is_causal := getattr(config, "is_causal", None)) is not None:
            self.causal = [bool(is_causal)] * len(sliding)
        elif getattr(config, "sliding_window_non_causal", False):
            self.causal = [False] * len(sliding)
        else:
            self.causal = sliding

    def context(self, taps: Tensor) -> Tensor:
        """[T, n*H] to [T, H]."""
        rows: Tensor = self.hidden_norm(self.fc(taps))
        return rows

    def forward(self, block: Tensor, context: Tensor) -> Tensor:
        """The output of the block [B, H] after ``context`` [T, H]."""
        positions = torch.arange(len(context) + len(block))  # [T + B]
        angles = torch.outer(positions.float(), self.rotary.inv_freq)  # [T + B, D/2]
        distance = positions[len(context) :, None] - positions  # [B, T + B]
        for layer, window, causal in zip(self.layers, self.windows, self.causal, strict=True):
            visible = torch.ones_like(distance, dtype=torch.bool)
            if causal:
                visible &= distance >= 0
            if window is not None:
                visible &= distance.abs() < window
            block = layer(block, context, angles, visible)
        output: Tensor = self.norm(block)
        return output


class DFlashReference:
    """A DFlash draft checkpoint together with the target that it was made for.

    The embedding and the head are the target's. With ``d2t`` the draft proposes only the
    tokens ``i + d2t[i]``. Layers of type ``sliding_attention`` see ``sliding_window`` positions,
    their own included, and are causal, also within the block, unless ``is_causal`` says
    otherwise of all layers, or ``sliding_window_non_causal`` of these. ``block_size`` may be set
    to run shorter blocks. Unknown or missing tensors raise torch's ``RuntimeError``.
    """

    def __init__(self, draft_folder: Path | str, target: TargetReference) -> None:
        """Loads the draft in float32."""
        self.target = target
        folder = Path(draft_folder)
        self.config = LlamaConfig.from_pretrained(folder)
        self.block_size: int = self.config.block_size
        self.mask_token_id: int = self.config.dflash_config["mask_token_id"]
        self.target_layer_ids: list[int] = self.config.dflash_config["target_layer_ids"]
        tensors = load_file(folder / "model.safetensors")
        offsets = tensors.pop("d2t", None)  # [N] int64
        self.target_ids = (
            torch.arange(self.config.vocab_size)
            if offsets is None
            else torch.arange(len(offsets)) + offsets
        )  # [N]
        self.embedding = target.embedding
        self.head = target.head[self.target_ids]  # [N, H]
        self._draft = _Draft(self.config, len(self.target_layer_ids)).eval()
        self._draft.load_state_dict({name: t.float() for name, t in tensors.items()})

    def _extend(self, ids: Sequence[int], cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """``TargetReference.extend``, and the taps of the same tokens [T, n*H]."""
        decoder_layers = self.target.model.get_decoder().layers
        layers = [decoder_layers[i] for i in self.target_layer_ids]
        outputs: dict[nn.Module, Tensor] = {}

        def keep(layer: nn.Module, _: Any, output: Tensor) -> None:
            outputs[layer] = output[0]  # [T, H]

        # The model's own hidden states end with the final norm's output, not the last layer's.
        hooks = [layer.register_forward_hook(keep) for layer in layers]
        features = self.target.extend(ids, cache)
        for hook in hooks:
            hook.remove()
        return features, torch.cat([outputs[layer] for layer in layers], dim=-1)

    def taps(self, token_ids: Sequence[int]) -> Tensor:
        """What the target's layers ``target_layer_ids`` put out, side by side [T, n*H]."""
        return self._extend(token_ids, self.target.new_cache())[1]

    @torch.inference_mode()
    def context(self, taps: Tensor) -> Tensor:
        """The draft's context rows [T, H] of ``taps`` [T, n*H], each row on its own."""
        return self._draft.context(taps)

    @torch.inference_mode()
    def logits(self, next_token: int, context: Tensor) -> Tensor:
        """The logits [B - 1, N] of the slots after ``next_token``.

        Args:
            next_token: The target's token at position n.
            context: The context rows of the tokens before it [n, H].
        """
        block = [next_token] + [self.mask_token_id] * (self.block_size - 1)
        output: Tensor = self._draft(self.embedding[block], context)  # [B, H]
        return output[1:] @ self.head.T / self.target.logits_scaling

    def _propose(self, next_token: int, context: Tensor, k: int) -> list[int]:
        if not 1 <= k < self.block_size:
            raise ValueError(f"a block of {self.block_size} slots has no {k} proposals")
        best = self.logits(next_token, context)[:k].argmax(dim=-1)  # [K]
        proposals: list[int] = self.target_ids[best].tolist()
        return proposals

    def propose(self, token_ids: Sequence[int], k: int) -> list[int]:
        """The K proposals after ``token_ids``, everything computed anew.

        The block always has all its slots; the first K of its predictions are taken.

        Args:
            token_ids: t_0 ... t_n: the verified tokens, then the target's next token.
            k: The number of proposals, less than the block size.
        """
        return self._propose(token_ids[-1], self.context(self.taps(token_ids[:-1])), k)

    def simulate(
        self, prompt_ids: Sequence[int], n_steps: int, k: int, eos: Collection[int] = ()
    ) -> list[DraftStep]:
        """Decodes greedily with speculation, target cache and context kept from step to step.

        Rejected tokens are cut off before the next step. Stops after ``n_steps`` steps, or
        before a step whose verified tokens after the prompt, or next token, hold one of
        ``eos``.
        """
        cache = self.target.new_cache()
        features, taps = self._extend(prompt_ids, cache)
        context = self.context(taps)
        ids = [*prompt_ids, int(self.target.logits(features[-1]).argmax())]  # t_0 ... t_n
        steps: list[DraftStep] = []
        while len(steps) < n_steps and not set(eos).intersection(ids[len(prompt_ids) :]):
            verified = len(ids) - 1
            proposals = self._propose(ids[-1], context, k)
            features, taps = self._extend([ids[-1], *proposals], cache)  # [K + 1, ...] each
            choices = self.target.logits(features).argmax(dim=-1).tolist()  # [K + 1]
            accepted = next((i for i in range(k) if proposals[i] != choices[i]), k)
            steps.append(DraftStep(verified, ids[-1], proposals, accepted))
            ids += choices[: accepted + 1]
            context = torch.cat([context, self.context(taps[: accepted + 1])])
            cache.crop(verified + 1 + accepted)
        return steps
