"""What is wrong with the files of checkpoints, found before MAX is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["check_checkpoints"]


def check_checkpoints(
    target: str, *, weight_path: Sequence[Path] = (), draft: str | None = None
) -> None:
    """Checks that checkpoints are there and their files whole, as far as that takes no time.

    Args:
        target: Folder or Hugging Face repository id; weights of a repository are left alone.
        weight_path: Weight files of the target instead of its own.
        draft: Likewise, if there is one.

    Raises:
        InputError: There is no such model, or a file is missing, damaged or of another format.
    """
    from unispec.checkpoints.generation_config import read_generation_config
    from unispec.checkpoints.model_config import read_config_object
    from unispec.checkpoints.repository import resolve_model, weight_files

    models = [(target, weight_path)] if draft is None else [(target, weight_path), (draft, ())]
    for model, _ in models:
        read_config_object(model)
    read_generation_config(target)
    found = [
        weight_files(model, stated)
        for model, stated in models
        if stated or isinstance(resolve_model(model), Path)
    ]
    # Imports numpy, so after what is told at once.
    from unispec.checkpoints import check_weight_files

    for paths in found:
        check_weight_files(paths)
