"""`benchmarks/gpu.py`: what is counted, what is written, and its loop, on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from max.driver import CPU, accelerator_count
from safetensors import safe_open

# As of a script that lies there.
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from on_gpu.contenders import CONTENDERS, mean_of_runs
from on_gpu.floor import copy_bytes_per_s, step_bytes
from on_gpu.job import Job
from on_gpu.random_checkpoint import random_draft, random_target
from on_gpu.shapes import LLAMA_8B, NUMBER_BYTES, DraftShape, Shape, numbers
from on_gpu.steps import Steps, Timed
from on_gpu.summary import summarise
from on_gpu.table import results_table
from on_gpu.worker import measure
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
TINY = Shape(
    name="tiny",
    layers=8,
    hidden=64,
    heads=4,
    key_heads=2,
    head_dim=16,
    intermediate=128,
    vocabulary=300,
    positions=512,
)
EAGLE, DFLASH = (CONTENDERS[f"unispec-{name}"].draft for name in ("eagle", "dflash"))
DRAFTS = pytest.mark.parametrize("draft", [EAGLE, DFLASH], ids=lambda draft: draft.method)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the session's are graphs and kernels."""
    monkeypatch.setattr("on_gpu.random_checkpoint.cache_folder", lambda: tmp_path)


def test_steps_count_while_all_rows_are_decoded() -> None:
    steps = Steps(2)
    for at, tokens in enumerate(([0, 1], [1, 1], [2, 3], [1, 4], [2], [1])):
        steps.ended(tokens, at=float(at * at))
    timed = steps.timed()
    assert timed.seconds == [3.0, 5.0]
    assert timed.tokens == [5, 5]


def test_a_batch_without_such_steps_is_an_error() -> None:
    steps = Steps(2)
    steps.ended([1, 1])
    steps.ended([1])
    with pytest.raises(RuntimeError, match="all of 2 rows"):
        steps.timed()


def test_the_shape_is_that_of_llama_3_1_8b() -> None:
    assert sum(numbers(tensors) for _, tensors in LLAMA_8B.files()) == 8_030_261_248


def test_a_step_reads_what_it_must() -> None:
    head = 128256 * 4096
    target = 8_030_261_248 - head - 4096  # neither the embedding nor the last norm
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336 + 4096
    eagle = layer + 2 * 4096 * 4096 + 4096
    cached = 2 * 1024 * 8 * 512
    expected = 2 * (target + 32 * cached + 3 * (eagle + head + cached))
    assert step_bytes(LLAMA_8B, EAGLE, rows=8, context=512) == expected


def test_a_copy_reads_and_writes() -> None:
    """Between 0.1 GB/s and more than any memory has."""
    assert 1e8 < copy_bytes_per_s(CPU(), 1 << 26) < 1e13


def test_max_means_another_acceptance_rate() -> None:
    """MAX's own search for the probability finds ours again."""
    from max.nn.sampling.rejection_sampler import compute_synthetic_acceptance_base_rate

    for rate, drafts in ((0.7, 3), (0.7, 7), (0.2, 5), (0.0, 3), (1.0, 3)):
        found = compute_synthetic_acceptance_base_rate(mean_of_runs(rate, drafts), drafts)
        assert found == pytest.approx(rate, abs=1e-6)


def test_ratios_are_to_max_with_the_same_draft() -> None:
    steps = Timed(seconds=[0.01, 0.01], tokens=[4, 6]), Timed(seconds=[0.03], tokens=[5])
    slow = Timed(seconds=[0.02], tokens=[5])
    measured = {"unispec-eagle": {2: steps}, "max-eagle": {2: [slow]}, "unispec-dflash": {2: steps}}
    found = summarise(measured, TINY, context=10, copy_bytes_per_s=1e9)[2]
    eagle = found["unispec-eagle"]
    assert (eagle.step_s, eagle.to_max, found["max-eagle"].to_max) == (0.01, 0.5, 1.0)
    assert found["unispec-dflash"].to_max is None
    assert eagle.tokens_per_s == pytest.approx(15 / 0.05)
    assert eagle.tokens_per_step == 2.5
    assert eagle.share == pytest.approx(step_bytes(TINY, EAGLE, 2, 10) / 1e9 / 0.01)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(results_table("tiny", {2: found}))
    assert "0.50" in capture.get()


@DRAFTS
@pytest.mark.usefixtures("own_cache")
def test_random_weights_have_the_shapes_that_are_counted(draft: DraftShape) -> None:
    stored = 0
    for folder in (random_target(TINY), random_draft(TINY, draft)):
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                names = tensors.keys()
                stored += sum(tensors.get_tensor(name).nbytes for name in names)
    target = sum(numbers(tensors) for _, tensors in TINY.files())
    assert stored == NUMBER_BYTES * (target + numbers(draft.tensors(TINY)))
    assert not list(random_draft(TINY, draft).parent.glob("*.*/"))  # nothing unfinished


@pytest.mark.compiles("the benchmark for GPUs")
@DRAFTS
@pytest.mark.usefixtures("own_cache")
def test_each_draft_stands_with_the_probability_asked_for(draft: DraftShape) -> None:
    job = Job(
        target=str(random_target(TINY)),
        draft_folder=str(random_draft(TINY, draft)),
        method=draft.method,
        draft_tokens=draft.draft_tokens,
        acceptance=0.7,
        devices="cpu",
        rows=16,
        context=20,
        max_length=256,
    )
    request = {"system": "unispec", "job": asdict(job), "batches": [1, 16], "new_tokens": 150}
    found = measure({**request, "vocabulary": TINY.vocabulary})
    assert found.keys() == {"1", "16"}
    tokens = found["16"]["tokens"]
    assert len(tokens) == len(found["16"]["seconds"]) > 20
    expected = sum(0.7**i for i in range(draft.draft_tokens + 1))
    assert sum(tokens) / len(tokens) / 16 == pytest.approx(expected, rel=0.08)


@pytest.mark.skipif(accelerator_count() > 0, reason="there is a GPU")
@pytest.mark.parametrize("command", ["benchmarks/gpu.py", "-m pytest tests/gpu"])
def test_without_a_gpu_it_says_so_and_stops(command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    assert "MAX finds no GPU on this machine" in line


def test_jobs_are_told_as_json() -> None:
    """What `gpu.py` hands to a process is what `measure` reads."""
    fields = {"target": "a", "draft_folder": "b", "method": "eagle", "draft_tokens": 3}
    sizes = {"rows": 1, "context": 2, "max_length": 3}
    job = Job(**fields, **sizes, acceptance=0.7, devices="gpu")
    assert Job(**json.loads(json.dumps(asdict(job)))) == job
