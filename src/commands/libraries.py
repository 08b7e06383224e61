"""What libraries may print."""

from __future__ import annotations

import os
import sys
import warnings

__all__ = ["quieten_libraries"]


def quieten_libraries() -> None:
    """Keeps warnings and download bars of libraries off the terminal, unless the user set them.

    Call it before the libraries are imported.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
