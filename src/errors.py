"""The one exception that a user's wrong input raises."""

from __future__ import annotations

__all__ = ["InputError"]


class InputError(ValueError):
    """Input that cannot be used: one sentence that names the value and the fix.

    The command line prints the sentence and exits with status 2; a server
    answers it with a client error. Anything else that is raised is a defect.
    """
