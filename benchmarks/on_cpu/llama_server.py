"""A llama.cpp server: in this process through `xllamacpp`, or a program of its own.

Imports the standard library only, and `xllamacpp` where that is asked for.
"""

from __future__ import annotations

import ctypes
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

__all__ = ["LlamaJob", "LlamaServer", "start_server"]

_START_S = 60
_SET_SIGNAL_OF_PARENTS_DEATH = 1
_NGRAM = 3
"""How many tokens have to stand in the text before for what followed them to be proposed."""


@dataclass(frozen=True, kw_only=True)
class LlamaJob:
    """What to load, and how it runs."""

    file: str
    threads: int
    rows: int
    """Most answers at a time."""
    max_length: int
    method: str | None = None
    """`"ngram"`, `"dflash"` or None."""
    draft_tokens: int = 0
    draft_file: str | None = None
    binary: str | None = None
    """A `llama-server`; None: `xllamacpp`."""


@dataclass(frozen=True)
class LlamaServer:
    """One that answers, until this process ends."""

    host: str
    """With its port."""
    about: str
    """Version, and the instructions of the processor that it was built for."""
    running: object
    """What runs it."""


def start_server(job: LlamaJob) -> LlamaServer:
    """Returns a server that has loaded the model."""
    if job.binary is not None:
        return _start_program(job, job.binary)
    import xllamacpp  # type: ignore[import-not-found, unused-ignore]

    server = xllamacpp.Server(_parameters(xllamacpp, job))
    features = re.findall(r"(\w+) = 1", xllamacpp.get_system_info())
    version = f"xllamacpp {xllamacpp.__version__}"
    address: str = server.listening_address
    return LlamaServer(address.removeprefix("http://"), f"{version}: {' '.join(features)}", server)


def _parameters(xlc: Any, job: LlamaJob) -> Any:
    """Defaults, but for what makes runs comparable: no cache between prompts, so many threads."""
    parameters = xlc.CommonParams()
    parameters.model.path = job.file
    parameters.n_ctx = job.rows * job.max_length
    parameters.n_parallel = job.rows
    parameters.kv_unified = True
    parameters.n_gpu_layers = 0
    parameters.cache_ram_mib = 0
    parameters.verbosity = -1
    draft = parameters.speculative.draft
    for cpu in (
        parameters.cpuparams,
        parameters.cpuparams_batch,
        draft.cpuparams,
        draft.cpuparams_batch,
    ):
        cpu.n_threads = job.threads
    kinds = xlc.common_speculative_type
    if job.method == "ngram":
        parameters.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
        parameters.speculative.ngram_simple.size_n = _NGRAM
        parameters.speculative.ngram_simple.size_m = job.draft_tokens
    elif job.method == "dflash":
        parameters.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_DFLASH]
        draft.mparams.path = job.draft_file
        draft.n_max = job.draft_tokens
        draft.n_gpu_layers = 0
    return parameters


def _start_program(job: LlamaJob, binary: str) -> LlamaServer:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    process = subprocess.Popen(
        [binary, *_options(job), "--port", host.rpartition(":")[2]],
        stdout=subprocess.DEVNULL,
        # It ends with this process, which is killed; see prctl(2).
        preexec_fn=lambda: ctypes.CDLL(None).prctl(
            _SET_SIGNAL_OF_PARENTS_DEATH, signal.SIGKILL, 0, 0, 0
        ),
    )
    _wait_until_ready(process, host)
    said = subprocess.run([binary, "--version"], capture_output=True, text=True)
    lines = (said.stdout + said.stderr).splitlines()
    version = next(line for line in lines if line.startswith("version"))
    return LlamaServer(host, f"{binary}, {version}", process)


def _options(job: LlamaJob) -> list[str]:
    """What `_parameters` says, as a command line."""
    options: list[object] = ["--model", job.file, "--ctx-size", job.rows * job.max_length]
    options += ["--parallel", job.rows, "--kv-unified", "--gpu-layers", 0, "--cache-ram", 0]
    options += ["--threads", job.threads, "--threads-batch", job.threads, "--log-disable"]
    if job.method == "ngram":
        options += ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", _NGRAM]
        options += ["--spec-ngram-simple-size-m", job.draft_tokens]
    elif job.method == "dflash":
        options += ["--spec-type", "draft-dflash", "--model-draft", job.draft_file]
        options += ["--spec-draft-n-max", job.draft_tokens, "--gpu-layers-draft", 0]
    return [str(option) for option in options]


def _wait_until_ready(process: subprocess.Popen[bytes], host: str) -> None:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{host}/health"):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError(f"the llama.cpp server at {host} did not start within {_START_S} s")
