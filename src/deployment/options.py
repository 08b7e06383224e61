"""Options of `unispec serve` as a configuration file has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from unispec.errors import InputError

__all__ = ["command_line"]

_OWN: Final = frozenset({"host", "port", "metrics-port", "ssl-certfile", "ssl-keyfile"})
"""What each replica has for itself, and HTTPS, which ends before Ray Serve."""
_SWITCHES: Final = {True: "", False: "no-", "true": "", "false": "no-"}


def command_line(options: Mapping[str, Any]) -> list[str]:
    """Options of `unispec serve` as its command line has them.

    Args:
        options: values by the options' names, without the dashes before them. True is a switch,
            False its `--no-` form, and a list an option that is given several times.

    Raises:
        InputError: an option that is each replica's own.
    """
    found = []
    for given, value in options.items():
        name = given.replace("_", "-")
        if name in _OWN:
            raise InputError(
                f"{given} is chosen for each replica; leave it out, and set where Ray Serve listens"
                " in http_options"
            )
        if isinstance(value, bool | str) and value in _SWITCHES:
            found.append(f"--{_SWITCHES[value]}{name}")
        else:
            values = value if isinstance(value, list) else [value]
            found += [f"--{name}={one}" for one in values]
    return found
