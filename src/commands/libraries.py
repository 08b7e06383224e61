"""Which libraries there are, and what they may print."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.util import find_spec

from unispec.errors import InputError

__all__ = ["check_installed", "quieten_libraries"]


def check_installed(*names: str) -> None:
    """Refuses to go on without packages of the `train` extra.

    Raises:
        InputError: some are not installed.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} is not installed; install the `train` extra, in a"
            " clone with pip install -c constraints.txt -e '.[train]'"
        )


def quieten_libraries() -> None:
    """Keeps warnings and download bars of libraries off the terminal, unless the user set them.

    Call it before the libraries are imported.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
