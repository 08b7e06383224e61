"""Modules of the benchmarks in processes of their own: JSON in, JSON out.

Every process gets the same processors, and as many threads. It is suspended while nothing is
asked of it: MAX's threads wake up also when there is nothing to do, and would slow the others.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Json", "Worker", "run_module", "serve", "start"]

Json = dict[str, Any]

_BENCHMARKS = Path(__file__).resolve().parent.parent
_ERROR_LINES = 15
_SET_SIGNAL_OF_PARENTS_DEATH = 1


class Worker:
    """A process that answers one request line with one result line; see `start`."""

    def __init__(self, module: str, process: subprocess.Popen[str], errors: TextIO) -> None:
        self._module = module
        self._process = process
        self._errors = errors

    def ask(self, request: Json) -> Json:
        """The result of one request.

        Raises:
            RuntimeError: the process has failed; the message ends with its last lines.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            tail = "".join(self._errors.readlines()[-_ERROR_LINES:])
            raise RuntimeError(f"{self._module} ended with status {status}:\n{tail}")
        self._process.send_signal(signal.SIGSTOP)
        result: Json = json.loads(line)
        return result


@contextmanager
def start(
    module: str,
    job: Json,
    *,
    threads: int,
    python: str = sys.executable,
    own_allocator: bool = False,
) -> Iterator[tuple[Worker, Json]]:
    """Starts a module, which calls `serve`.

    Args:
        module: with its package, as `generation.worker`.
        job: its first request, what to load.
        threads: how many, and on how many processors.
        python: the interpreter; another one needs only what the module imports.
        own_allocator: whether it has the C library's also where this process has MAX's, with
            which OpenVINO crashes.

    Yields:
        The process, and what it said when it had loaded.
    """
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    if own_allocator:
        environment.pop("LD_PRELOAD", None)
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            [python, "-m", module, str(threads)],
            cwd=_BENCHMARKS,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            worker = Worker(module, process, errors)
            yield worker, worker.ask({**job, "threads": threads})
        finally:
            process.kill()
            with suppress(BrokenPipeError):
                process.communicate()


def run_module(module: str, job: Json, *, threads: int) -> Json:
    """Runs a module on one job; see `start`."""
    with start(module, job, threads=threads) as (_, result):
        return result


def serve(load: Callable[[Json], tuple[Json, Callable[[Json], Json] | None]]) -> None:
    """The other side: loads what the first line says, then answers the lines that follow.

    Args:
        load: from a job to what is said of it and, if there is more to ask, who answers.
    """
    # A suspended process would not see that its parent is gone; see prctl(2).
    ctypes.CDLL(None).prctl(_SET_SIGNAL_OF_PARENTS_DEATH, signal.SIGKILL, 0, 0, 0)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
    # What libraries print goes elsewhere.
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)
        result, answer = load(json.loads(sys.stdin.readline()))
        while True:
            print(json.dumps(result), file=results, flush=True)
            line = sys.stdin.readline()
            if not line or answer is None:
                return
            result = answer(json.loads(line))
