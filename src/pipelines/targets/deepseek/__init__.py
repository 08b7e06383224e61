"""DeepSeek-V3: latent attention and routed experts, on one CPU or on up to 8 GPUs.

`spread` says whether GPUs have some of the experts each, and attention whole; `mesh` is the devices
of a step, and what a list holds "by device" has one entry for each of them.
"""

from __future__ import annotations

from .family import DEEPSEEK_V3

__all__ = ["DEEPSEEK_V3"]
