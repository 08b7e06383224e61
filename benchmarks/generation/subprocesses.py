"""Runs a module of this package in a process of its own: one JSON job in, one JSON result out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

__all__ = ["run_module", "serve_job"]

Json = dict[str, Any]

_FOLDER = Path(__file__).resolve().parent
_ERROR_LINES = 15


def run_module(module: str, job: Json, *, threads: int) -> tuple[Json, float]:
    """Runs `generation.<module>` on a job.

    Every process gets the same processors, and as many threads.

    Returns:
        Its result, and the wall time of the whole process in seconds.

    Raises:
        RuntimeError: the process failed; the message ends with its last lines.
    """
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file = Path(folder, "job.json"), Path(folder, "result.json")
        job_file.write_text(json.dumps({**job, "threads": threads}))
        start = perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", f"{_FOLDER.name}.{module}", str(job_file), str(result_file)],
            cwd=_FOLDER.parent,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        wall_s = perf_counter() - start
        if done.returncode != 0:
            tail = "\n".join(done.stderr.splitlines()[-_ERROR_LINES:])
            raise RuntimeError(f"{module} ended with status {done.returncode}:\n{tail}")
        return json.loads(result_file.read_text()), wall_s


def serve_job(work: Callable[[Json], Json]) -> None:
    """The other side: does the job that the command line names, on its share of the machine."""
    job_file, result_file = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text())
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    result_file.write_text(json.dumps(work(job)))
