"""Making drafts: a target answers prompts, and a draft learns to foresee its answers.

Needs torch, which the `train` extra installs; nothing else in the package does.
"""

from __future__ import annotations

from .collecting import CollectSettings, collect
from .collection import Collection
from .fitting import FitSettings, fit
from .methods import DraftShape, make_draft
from .publish import publish
from .target import TorchTarget

__all__ = [
    "CollectSettings",
    "Collection",
    "DraftShape",
    "FitSettings",
    "TorchTarget",
    "collect",
    "fit",
    "make_draft",
    "publish",
]
