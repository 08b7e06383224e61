"""What is wrong with the files of checkpoints, found before MAX is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unispec.methods import Method

__all__ = ["check_checkpoints"]


def check_checkpoints(
    target: str,
    *,
    weight_path: Sequence[Path] = (),
    draft: str | None = None,
    method: Method | None = None,
) -> None:
    """Checks that checkpoints exist and their files are complete, as far as that takes no time.

    Args:
        weight_path: weight files of the target instead of its own.
        draft: likewise, if there is one.
        method: what the draft is for; None: it is not looked at what kind of draft it is.

    Raises:
        InputError: there is no such model, a file is missing, damaged or of another format, or
            the draft is of another kind.
    """
    from unispec.checkpoints.generation_config import read_generation_config
    from unispec.checkpoints.model_config import read_config_object
    from unispec.checkpoints.repository import resolve_model, weight_files

    models = [(target, weight_path)] if draft is None else [(target, weight_path), (draft, ())]
    for model, _ in models:
        read_config_object(model)
    read_generation_config(target)
    weights = [
        weight_files(model, named)
        for model, named in models
        if named or isinstance(resolve_model(model), Path)
    ]
    # Imports numpy, so after what is told at once.
    from unispec.checkpoints import check_weight_files

    for paths in weights:
        # How much memory they need is told when the engine knows where they run.
        check_weight_files(paths, as_stored=True)
    if draft is None or method is None:
        return
    from unispec.checkpoints.draft_kinds import check_draft_files, check_draft_kind

    if isinstance(resolve_model(draft), Path):
        check_draft_files(method, weights[-1], source=draft)
    check_draft_kind(method, read_config_object(draft), source=draft)
