"""Attention of the target while it answers on a CPU.

transformers copies keys and values for each query head of a group before torch's attention, which
costs three tenths of the time of a batch whose prompts are padded. One token's queries need no
copies: those of a group read their keys as if they were one head's queries for several tokens.
"""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["GROUPED"]

GROUPED: Final = "unispec_grouped"
"""Name of this attention for `set_attn_implementation`."""


def _grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: `[B, heads, T, head_dim]`.
        key: `[B, kv_heads, L, head_dim]`.
        value: `[B, kv_heads, L, head_dim]`.

    Returns:
        `[B, T, heads, head_dim]`, and no weights.
    """
    rows, heads, tokens, width = query.shape
    if tokens > 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    grouped = query.view(rows, key.shape[1], -1, width)  # [B, kv_heads, heads / kv_heads, head_dim]
    attended = F.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return attended.reshape(rows, 1, heads, width), None


AttentionInterface.register(GROUPED, _grouped)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
