"""Builders of tiny random checkpoints in HF format, from single models to ready pairs."""

from .causal_lm import tiny_causal_lm
from .deepseek import agreeing_deepseek, in_fp8_blocks, tiny_deepseek
from .dflash import agreeing_dflash, tiny_dflash
from .eagle import agreeing_eagle, tiny_eagle
from .eagle3 import Dialect, agreeing_eagle3, tiny_eagle3
from .flat import flat_pair
from .llama import agreeing_llama, tiny_llama
from .presets import (
    COMPILED_PAIRS,
    EAGLE3_PAIRS,
    EAGLE_PAIRS,
    NEAR_DELTA,
    NEAR_TOP_N,
    PRESETS,
    RELATIVE_PAIRS,
    TinyPair,
)

__all__ = [
    "COMPILED_PAIRS",
    "EAGLE3_PAIRS",
    "EAGLE_PAIRS",
    "NEAR_DELTA",
    "NEAR_TOP_N",
    "PRESETS",
    "RELATIVE_PAIRS",
    "Dialect",
    "TinyPair",
    "agreeing_deepseek",
    "agreeing_dflash",
    "agreeing_eagle",
    "agreeing_eagle3",
    "agreeing_llama",
    "flat_pair",
    "in_fp8_blocks",
    "tiny_causal_lm",
    "tiny_deepseek",
    "tiny_dflash",
    "tiny_eagle",
    "tiny_eagle3",
    "tiny_llama",
]
