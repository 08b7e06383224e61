"""Training drafts: a target answers prompts, and a draft learns to predict its answers.

`train_draft` does all of it, with the settings below. All but the settings needs torch, which the
`train` extra installs; nothing else in the package does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from .settings import CollectSettings, DraftShape, FitSettings

if TYPE_CHECKING:
    from .building import make_draft
    from .collecting import collect
    from .collection import Collection
    from .fitting import History, Measure, fit
    from .publishing import publish
    from .target import TorchTarget
    from .trainer import Progress, TrainedDraft, train_draft

__all__ = [
    "CollectSettings",
    "Collection",
    "DraftShape",
    "FitSettings",
    "History",
    "Measure",
    "Progress",
    "TorchTarget",
    "TrainedDraft",
    "collect",
    "fit",
    "make_draft",
    "publish",
    "train_draft",
]

_MODULES: Final = {
    "Collection": "collection",
    "History": "fitting",
    "Measure": "fitting",
    "Progress": "trainer",
    "TorchTarget": "target",
    "TrainedDraft": "trainer",
    "collect": "collecting",
    "fit": "fitting",
    "make_draft": "building",
    "publish": "publishing",
    "train_draft": "trainer",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: a command shows the settings without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
