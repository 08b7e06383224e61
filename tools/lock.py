"""Print constraints.txt: what pip installs for every extra, on each of the given Pythons.

    python tools/lock.py python3.10 python3.11 python3.12 python3.13 > constraints.txt

A constraint binds only a package that is installed anyway, so one line per package is
enough where all Pythons agree; where they do not, markers tell the lines apart.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENT = f"{ROOT}[bench,docs,ray,test,train]"
HEADER = """\
# The exact version of every package that a fresh install gets on Linux; pip takes it as -c.
# Written by `make lock`; do not edit.
"""

Version = tuple[int, int]
Pins = dict[str, str]


def python_version(python: str) -> Version:
    """The (major, minor) of an interpreter."""
    code = "import sys; print(*sys.version_info[:2])"
    major, minor = subprocess.check_output([python, "-c", code], text=True).split()
    return int(major), int(minor)


def resolve(python: str) -> Pins:
    """What this interpreter's own pip would install: normalised name to public version."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        report = Path(folder) / "report.json"
        pip = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet"]
        subprocess.run(
            [*pip, "--dry-run", "--ignore-installed", "--report", str(report), REQUIREMENT],
            check=True,
        )
        installed = json.loads(report.read_text(encoding="utf-8"))["install"]
    pins = {}
    for package in installed:
        name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
        # A local build, such as 2.13.0+cpu, satisfies the public version, not the reverse.
        pins[name] = package["metadata"]["version"].partition("+")[0]
    del pins["unispec"]
    return pins


def constraint_lines(name: str, versions: Mapping[Version, str]) -> list[str]:
    """The lines of one package, from the version that each Python needs."""
    pythons = sorted(versions)
    starts = [p for i, p in enumerate(pythons) if i == 0 or versions[p] != versions[pythons[i - 1]]]
    lines = []
    for i, start in enumerate(starts):
        bounds = [f'python_version >= "{start[0]}.{start[1]}"'] if i > 0 else []
        bounds += [f'python_version < "{end[0]}.{end[1]}"' for end in starts[i + 1 : i + 2]]
        marker = f" ; {' and '.join(bounds)}" if bounds else ""
        lines.append(f"{name}=={versions[start]}{marker}")
    return lines


def lock(pythons: Sequence[str]) -> str:
    """The text of constraints.txt."""
    needed: dict[str, dict[Version, str]] = {}
    for python in pythons:
        version = python_version(python)
        for name, pin in resolve(python).items():
            needed.setdefault(name, {})[version] = pin
    lines = [line for name in sorted(needed) for line in constraint_lines(name, needed[name])]
    return HEADER + "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(lock(sys.argv[1:]))
