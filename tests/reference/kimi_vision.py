"""Kimi K2.5's vision tower and projector in torch, straight from a checkpoint's tensors.

Written from the description in moonshotai/Kimi-K2.5's ``modeling_kimi_k25.py`` and vLLM's
``kimi_k25_vit.py``: several items at once, told apart by a mask, positions by torch's own
interpolation, rotation by complex numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KimiVisionReference"]


class KimiVisionReference:
    """Tower and projector of a checkpoint, float32."""

    def __init__(self, tensors: Mapping[str, Tensor], vision_config: Mapping[str, Any]) -> None:
        """Keeps the tensors under their own names."""
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}
        self.config = vision_config

    @torch.inference_mode()
    def features(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Features [N, H] of each item; ``pixels`` [L, 3, P, P] has all items one by one."""
        sizes = [t * h * w for t, h, w in grids]
        x = F.conv2d(
            pixels,
            self._get("patch_embed.proj.weight"),
            self._get("patch_embed.proj.bias"),
            stride=self.config["patch_size"],
        ).flatten(1)  # [L, D]
        x = x + torch.cat([self._positions(*grid) for grid in grids])
        turns = torch.cat([self._turns(*grid) for grid in grids])  # [L, head_dim / 2]
        owner = torch.repeat_interleave(torch.arange(len(grids)), torch.tensor(sizes))
        hidden = (owner[:, None] != owner[None]).float() * -1e30  # [L, L]
        for block in range(self.config["vt_num_hidden_layers"]):
            x = self._block(x, turns, hidden, f"encoder.blocks.{block}.")
        x = self._norm(x, "encoder.final_layernorm.")
        return [self._project(part, grid) for part, grid in zip(x.split(sizes), grids, strict=True)]

    def _get(self, name: str) -> Tensor:
        return self.tensors["vision_tower." + name]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._get(name + "weight"), self._get(name + "bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._get(name + "weight"), self._get(name + "bias"))

    def _positions(self, frames: int, rows: int, columns: int) -> Tensor:
        table = self._get("patch_embed.pos_emb.weight")  # [height, width, D]
        if table.shape[:2] != (rows, columns):
            stretched = F.interpolate(table.permute(2, 0, 1)[None], (rows, columns), mode="bicubic")
            table = stretched[0].permute(1, 2, 0)
        spatial = table.reshape(1, rows * columns, -1)
        if frames == 1:
            return spatial[0]
        half = spatial.shape[-1] // 2
        speed = 1 / 10000 ** (torch.arange(half, dtype=torch.float32) / half)
        angle = torch.arange(frames, dtype=torch.float32)[:, None] * speed
        time = torch.cat([angle.sin(), angle.cos()], dim=1)  # [frames, D]
        return (spatial + time[:, None]).flatten(0, 1)

    def _turns(self, frames: int, rows: int, columns: int) -> Tensor:
        width = self.config["vt_hidden_size"] // self.config["vt_num_attention_heads"]
        speed = 1 / 10000 ** (torch.arange(0, width, 4)[: width // 4].float() / width)
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        pairs = [torch.outer(place.flatten().float(), speed) for place in (column, row)]
        angles = torch.stack(pairs, dim=-1).flatten(1)  # [rows * columns, head_dim / 2]
        return torch.polar(torch.ones_like(angles), angles).repeat(frames, 1)

    def _block(self, x: Tensor, turns: Tensor, hidden: Tensor, name: str) -> Tensor:
        heads = self.config["vt_num_attention_heads"]
        qkv = self._linear(self._norm(x, name + "norm0."), name + "wqkv.")
        query, key, value = qkv.view(len(x), 3, heads, -1).permute(1, 2, 0, 3)  # [heads, L, d]

        def turned(part: Tensor) -> Tensor:
            pairs = torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * turns).flatten(-2)

        scores = turned(query) @ turned(key).transpose(1, 2) / value.shape[-1] ** 0.5 + hidden
        attended = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
        x = x + self._linear(attended, name + "wo.")
        inner = F.gelu(
            self._linear(self._norm(x, name + "norm1."), name + "mlp.fc0."), approximate="tanh"
        )
        return x + self._linear(inner, name + "mlp.fc1.")

    def _project(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        frames, rows, columns = grid
        x = x.view(frames, rows // 2, 2, columns // 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
        x = x.mean(0).flatten(0, 1).flatten(1, 2)  # [N, 4, D]

        def get(name: str) -> Tensor:
            return self.tensors["mm_projector." + name]

        eps = self.config["projector_ln_eps"]
        x = F.layer_norm(
            x, x.shape[-1:], get("pre_norm.weight"), get("pre_norm.bias"), eps
        ).flatten(1)
        x = F.gelu(F.linear(x, get("proj.0.weight"), get("proj.0.bias")))
        return F.linear(x, get("proj.2.weight"), get("proj.2.bias"))
