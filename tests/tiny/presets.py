"""Pairs of target and draft that differ in everything a checkpoint may differ in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unispec.methods import Method

from .deepseek import agreeing_deepseek, tiny_deepseek
from .dflash import agreeing_dflash, tiny_dflash
from .eagle import agreeing_eagle, tiny_eagle
from .eagle3 import agreeing_eagle3, tiny_eagle3
from .kimi import tiny_kimi, tiny_kimi_draft
from .llama import agreeing_llama, tiny_llama

__all__ = [
    "COMPILED_PAIRS",
    "EAGLE3_PAIRS",
    "EAGLE_PAIRS",
    "NEAR_DELTA",
    "NEAR_TOP_N",
    "PRESETS",
    "RELATIVE_PAIRS",
    "TinyPair",
]

NEAR_TOP_N = 3
NEAR_DELTA = 0.3
"""What stands in thinking blocks of a relaxed pair."""


@dataclass(frozen=True)
class TinyPair:
    """Folders of a target and of its draft, if that is apart, and how the engine tests run them."""

    target: Path
    draft: Path | None
    method: Method = "eagle"
    draft_proposal: Literal["argmax", "sampled"] = "argmax"
    relaxed: bool = False
    """Whether drafts near the top stand in thinking blocks, of which a test says where they are."""


def _llama_eagle(folder: Path) -> TinyPair:
    """Grouped queries, tied head, plain draft."""
    target = tiny_llama(
        folder / "target",
        hidden_size=64,
        intermediate_size=160,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab_size=256,
        tie=True,
        seed=1,
    )
    return TinyPair(target, tiny_eagle(folder / "draft", target, seed=11))


def _llama_eagle_biased(folder: Path) -> TinyPair:
    """One KV head wider than hidden / heads, biases, scaled RoPE.

    The draft has two layers and a quarter of the vocabulary, and is sampled.
    """
    target = tiny_llama(
        folder / "target",
        hidden_size=96,
        intermediate_size=224,
        layers=3,
        heads=6,
        kv_heads=1,
        head_dim=32,
        vocab_size=320,
        tie=False,
        attention_bias=True,
        rope="llama3",
        seed=6,
    )
    draft = tiny_eagle(folder / "draft", target, layers=2, fc_bias=True, d2t=80, seed=12)
    return TinyPair(target, draft, draft_proposal="sampled")


def _llama_eagle_bfloat16(folder: Path) -> TinyPair:
    """No grouping, bfloat16 files, draft of a quarter of the vocabulary."""
    target = tiny_llama(
        folder / "target",
        hidden_size=128,
        intermediate_size=256,
        layers=2,
        heads=8,
        kv_heads=8,
        head_dim=16,
        vocab_size=512,
        tie=False,
        dtype="bfloat16",
        seed=3,
    )
    return TinyPair(target, tiny_eagle(folder / "draft", target, d2t=128, seed=13))


def _llama_eagle_agreeing(folder: Path) -> TinyPair:
    """A draft that agrees with its target on most tokens, in runs of every length."""
    target = agreeing_llama(folder / "target", seed=4)
    return TinyPair(target, agreeing_eagle(folder / "draft", target, seed=14))


def _llama_eagle3_agreeing(folder: Path) -> TinyPair:
    """A draft in SpecForge's form, of most tokens; it agrees with its target on many of them."""
    target = agreeing_llama(folder / "target", layers=8, seed=4)
    return TinyPair(target, agreeing_eagle3(folder / "draft", target, d2t=232, seed=17), "eagle3")


def _llama_eagle3_sampled(folder: Path) -> TinyPair:
    """The last layer is tapped; the draft has two layers and all options of its library.

    It is narrower than its target, embeds and proposes by matrices of its own, a quarter of the
    tokens, and is sampled.
    """
    target = tiny_llama(
        folder / "target",
        hidden_size=96,
        intermediate_size=224,
        layers=5,
        heads=6,
        kv_heads=2,
        head_dim=16,
        vocab_size=320,
        tie=False,
        seed=18,
    )
    draft = tiny_eagle3(
        folder / "draft",
        target,
        dialect="speculators",
        taps=(4, 0, 2),
        d2t=80,
        layers=2,
        own_embedding=True,
        hidden_size=64,
        qk_norm=True,
        heads=(4, 2, 32),
        norm_before_residual=True,
        fc_norm=True,
        norm_output=True,
        seed=19,
    )
    return TinyPair(target, draft, "eagle3", draft_proposal="sampled")


def _qwen3_eagle3(folder: Path) -> TinyPair:
    """A Qwen3; the draft norms all taps as one, has biases and proposes all tokens."""
    target = tiny_llama(
        folder / "target",
        hidden_size=64,
        intermediate_size=160,
        layers=9,
        heads=4,
        kv_heads=2,
        head_dim=32,
        vocab_size=256,
        tie=False,
        seed=24,
        model_type="qwen3",
    )
    draft = tiny_eagle3(
        folder / "draft",
        target,
        taps=(1, 3, 5),
        d2t=None,
        biased=True,
        norm_before_fc=True,
        seed=34,
    )
    return TinyPair(target, draft, "eagle3")


def _llama_dflash_windowed(folder: Path, *, both_ways: bool | None = None) -> TinyPair:
    """No grouping, bfloat16 files.

    The draft has taps out of order for a windowed and a full layer, wide heads, few tokens.
    """
    target = tiny_llama(
        folder / "target",
        hidden_size=64,
        intermediate_size=160,
        layers=4,
        heads=4,
        kv_heads=4,
        head_dim=16,
        vocab_size=256,
        tie=True,
        dtype="bfloat16",
        seed=5,
    )
    draft = tiny_dflash(
        folder / "draft",
        target,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
        block_size=6,
        target_layer_ids=(3, 0, 1),
        mask_token_id=255,
        d2t=100,
        sliding_window=40,
        layer_types=("sliding_attention", "full_attention"),
        sliding_window_non_causal=both_ways,
        seed=15,
    )
    return TinyPair(target, draft, "dflash")


def _llama_dflash_agreeing(folder: Path) -> TinyPair:
    """A DFlash draft that agrees with `llama_eagle_agreeing`'s target; of most tokens, sampled."""
    target = agreeing_llama(folder / "target", seed=4)
    draft = agreeing_dflash(folder / "draft", target, d2t=232, seed=16)
    return TinyPair(target, draft, "dflash", draft_proposal="sampled")


def _deepseek_mtp_agreeing(folder: Path) -> TinyPair:
    """An MTP layer that agrees with its target on most tokens.

    Queries without a latent, YaRN, a dense layer, four groups of four experts; FP8 blocks. Its
    graph can relax acceptance, which changes nothing outside thinking blocks.
    """
    return TinyPair(agreeing_deepseek(folder / "target", seed=9), None, "mtp", relaxed=True)


def _deepseek_mtp_sampled(folder: Path) -> TinyPair:
    """Queries with a latent, plain RoPE in halves, one group of eight experts; sampled drafts."""
    target = tiny_deepseek(
        folder / "target",
        q_lora_rank=24,
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        layers=2,
        first_k_dense_replace=0,
        n_shared_experts=2,
        rope_interleave=False,
        norm_topk_prob=False,
        seed=8,
    )
    return TinyPair(target, None, "mtp", draft_proposal="sampled")


def _deepseek_mtp(folder: Path) -> TinyPair:
    """Queries with a latent, YaRN, a dense layer, two groups of four experts."""
    target = tiny_deepseek(
        folder / "target",
        q_lora_rank=24,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        layers=2,
        first_k_dense_replace=1,
        rope="yarn",
        seed=7,
    )
    return TinyPair(target, None, "mtp")


def _kimi_dflash(folder: Path) -> TinyPair:
    """A Kimi K2.5 and a DFlash draft."""
    target = tiny_kimi(folder / "target", seed=3)
    draft = tiny_kimi_draft(folder / "draft", target, folder / "scratch", seed=4)
    return TinyPair(target, draft, "dflash")


def _llama_dflash_both_ways(folder: Path) -> TinyPair:
    """As `llama_dflash_windowed`, but that layer sees later slots of the block too."""
    return _llama_dflash_windowed(folder, both_ways=True)


def _qwen2_eagle(folder: Path) -> TinyPair:
    """A Qwen2.5, q, k and v with biases, and a draft that agrees on most tokens."""
    target = agreeing_llama(folder / "target", model_type="qwen2", seed=21)
    return TinyPair(target, agreeing_eagle(folder / "draft", target, seed=31))


def _qwen3_dflash(folder: Path) -> TinyPair:
    """A Qwen3, its heads wider than hidden / heads, and a draft that agrees on most tokens."""
    target = agreeing_llama(folder / "target", model_type="qwen3", head_dim=32, seed=22)
    return TinyPair(target, agreeing_dflash(folder / "draft", target, seed=32), "dflash")


def _granite_eagle(folder: Path) -> TinyPair:
    """A Granite, scaled wherever it can be, and a draft that agrees on most tokens; sampled."""
    target = agreeing_llama(folder / "target", model_type="granite", seed=23)
    draft = agreeing_eagle(folder / "draft", target, seed=33)
    return TinyPair(target, draft, draft_proposal="sampled")


def _mistral_eagle(folder: Path) -> TinyPair:
    """`llama_eagle_agreeing` as a Mistral: the graph is the same."""
    target = agreeing_llama(folder / "target", model_type="mistral", seed=4)
    return TinyPair(target, agreeing_eagle(folder / "draft", target, seed=14))


PRESETS: Mapping[str, Callable[[Path], TinyPair]] = {
    "llama_eagle": _llama_eagle,
    "llama_eagle_biased": _llama_eagle_biased,
    "llama_eagle_bfloat16": _llama_eagle_bfloat16,
    "llama_eagle_agreeing": _llama_eagle_agreeing,
    "llama_eagle3_agreeing": _llama_eagle3_agreeing,
    "llama_eagle3_sampled": _llama_eagle3_sampled,
    "qwen3_eagle3": _qwen3_eagle3,
    "llama_dflash_windowed": _llama_dflash_windowed,
    "llama_dflash_agreeing": _llama_dflash_agreeing,
    "deepseek_mtp_agreeing": _deepseek_mtp_agreeing,
    "deepseek_mtp_sampled": _deepseek_mtp_sampled,
    "deepseek_mtp": _deepseek_mtp,
    "kimi_dflash": _kimi_dflash,
    "llama_dflash_both_ways": _llama_dflash_both_ways,
    "qwen2_eagle": _qwen2_eagle,
    "qwen3_dflash": _qwen3_dflash,
    "granite_eagle": _granite_eagle,
    "mistral_eagle": _mistral_eagle,
}
"""Each writes its pair below a folder and returns where."""

EAGLE3_PAIRS = ("llama_eagle3_agreeing", "llama_eagle3_sampled", "qwen3_eagle3")

EAGLE_PAIRS = ("llama_eagle", "llama_eagle_biased", "llama_eagle_bfloat16", "llama_eagle_agreeing")

COMPILED_PAIRS = (
    "llama_eagle_biased",
    "llama_eagle_agreeing",
    "llama_eagle3_agreeing",
    "llama_eagle3_sampled",
    "llama_dflash_windowed",
    "llama_dflash_agreeing",
    "deepseek_mtp_agreeing",
    "deepseek_mtp_sampled",
)
"""Those that all engine tests run; a graph takes time to compile."""

RELATIVE_PAIRS = ("qwen2_eagle", "qwen3_dflash", "qwen3_eagle3", "granite_eagle")
"""Of targets that differ from Llama in what they compute."""
