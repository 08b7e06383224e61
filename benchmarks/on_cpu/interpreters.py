"""Which interpreter has what a contender needs, and what to install where none has it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Final

import click

from .contenders import System

__all__ = ["Interpreters", "python_option"]

_LOOK: Final = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
_NEEDS: Final = {
    "llama.cpp": ("xllamacpp", "pip install xllamacpp"),
    "openvino": ("openvino_genai", "pip install openvino-genai"),
    "transformers": ("torch", "pip install -e '.[bench]'"),
}


def python_option(program: str, package: str) -> Any:
    """The option `--PROGRAM-python`, an interpreter; by default the one that runs."""
    variable = f"UNISPEC_{program.upper()}_PYTHON"
    return click.option(
        f"--{program}-python",
        type=click.Path(exists=True, dir_okay=False),
        envvar=variable,
        default=sys.executable,
        help=f"A Python that has {package}; or set ${variable}.",
        show_default="this one",
    )


@dataclass(frozen=True, kw_only=True)
class Interpreters:
    """Paths of Python interpreters."""

    own: str
    llama_cpp: str
    openvino: str
    llama_server: str | None = None
    """Takes the place of xllamacpp."""

    def of(self, system: System) -> str:
        """The interpreter that runs the contender."""
        return {"llama.cpp": self.llama_cpp, "openvino": self.openvino}.get(system, self.own)

    def missing(self, system: System) -> str | None:
        """What to do before the contender can run; None: nothing."""
        if system not in _NEEDS or (system == "llama.cpp" and self.llama_server is not None):
            return None
        module, fix = _NEEDS[system]
        found = subprocess.run([self.of(system), "-c", _LOOK, module])
        return None if found.returncode == 0 else f"not installed: {fix}"
