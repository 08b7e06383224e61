"""Which copies between devices a step makes of what it was given: a walk over a graph's text.

Copies of constants and weights are made before the first step and are left out.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

__all__ = ["Transfer", "transfers"]

_GRAPH = re.compile(r"(?m)^  mo\.graph @([\w.]+)")
_RESULTS = re.compile(r"\s*((?:%\w+(?::\d+)?(?:, )?)+) = (.*)")
_TRANSFER = re.compile(r"rmo\.mo\.transfer\S* (%[\w#]+) : !mo\.(\S+<[^>]*>) to <\"?(\w+)")
_CALL = re.compile(r"@([\w.]+)(?:\[[^\]]*\])?(?:<[^(]*>)?\(([^)]*)\)")
_VALUE = re.compile(r"%\w+")


class Transfer(NamedTuple):
    """A copy that runs in each step."""

    graph: str
    """The graph that it is in, the layers' among them."""
    kind: str
    """Of what is copied, as MLIR has it."""
    to: str
    """`gpu` or `cpu`."""


def transfers(text: str) -> list[Transfer]:
    """The copies of values that depend on the inputs of the first graph, each once."""
    starts = [*(found.start() for found in _GRAPH.finditer(text)), len(text)]
    bodies = {}
    for begin, end in pairwise(starts):
        body = text[begin:end]
        name = _GRAPH.match(body)
        assert name is not None
        bodies[name[1]] = body.splitlines()
    first = next(iter(bodies))
    return list(dict.fromkeys(_walk(bodies, first, None)))


def _walk(bodies: dict[str, list[str]], name: str, given: list[bool] | None) -> list[Transfer]:
    """Of one graph.

    Args:
        given: of each argument whether it depends on the step's inputs; None: all do.
    """
    head, *lines = bodies[name]
    arguments = re.findall(r"(%arg\d+):", head)
    flags = [True] * len(arguments) if given is None else given
    depend = {value for value, flag in zip(arguments, flags, strict=True) if flag}
    found: list[Transfer] = []
    for line in lines:
        matched = _RESULTS.match(re.sub(r"loc\(.*$", "", line))
        if matched is None:
            continue
        results, right = _VALUE.findall(matched[1]), matched[2]
        if right.startswith("mo.while"):
            # What goes round in a loop depends on the step.
            depend |= {*results, *re.findall(r"as (%\w+)", right)}
            continue
        taken = set(_VALUE.findall(right)) & depend
        # Sizes that are known in a step only.
        sized = right.startswith("rmo.shape_to_tensor") and re.search(r"\[[^\]]*[a-z]", right)
        if called := right.startswith("mo.call") and _CALL.search(right):
            values = _VALUE.findall(called[2])
            if called[1] in bodies:
                found += _walk(bodies, called[1], [value in depend for value in values])
        copied = _TRANSFER.match(right)
        if copied and copied[1].split("#")[0] in depend:
            found.append(Transfer(name, copied[2], copied[3]))
        # A name that a loop's body gave may be given again behind it.
        is_new = copied[1].split("#")[0] in depend if copied else taken or sized or called
        depend = depend | set(results) if is_new else depend - set(results)
    return found
