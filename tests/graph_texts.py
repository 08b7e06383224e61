"""The text of every graph, before it is compiled, and what changed in one.

`python tests/graph_texts.py FOLDER` writes each text and its weights to a file of the folder, so
that the graphs of two commits can be compared with `diff -r`; with `--record` it writes the digests
that `test_graph_texts.py` holds the graphs against.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from max.engine import InferenceSession
from tiny import PRESETS, TinyPair

from unispec.engine import Engine, EngineConfig
from unispec.kernels.library import kernel_package

__all__ = [
    "GRAPHS",
    "RECORDED",
    "VIRTUAL",
    "Built",
    "build",
    "build_pair",
    "describe",
    "nothing_compiled",
    "weight_type",
]

MAX_S_OWN = "ragged_logprobs"
"""The graph that MAX's mixin loads beside that of a model."""

RECORDED = Path(__file__).parent / "data" / "graphs.json"


class Built(Exception):
    """A graph that would be compiled now, as text, and number format and shape of its weights."""

    def __init__(self, text: str, weights: Mapping[str, str]) -> None:
        super().__init__()
        self.text = text
        self.weights = dict(sorted(weights.items()))


def weight_type(weight: Any) -> str:
    """Number format and shape of a NumPy array, or of one of MAX's buffers."""
    dtype = getattr(weight.dtype, "name", str(weight.dtype))
    return f"{dtype} {[int(size) for size in weight.shape]}"


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Whatever would be compiled is raised as `Built` instead."""

    def stop(session: InferenceSession, model: Any, *_: Any, **options: Any) -> None:
        if getattr(model, "name", None) == MAX_S_OWN:
            return
        # A graph alone would be shown without its subgraphs.
        text = str(getattr(model, "module", model).mlir_module)
        weights = options.get("weights_registry") or {}
        raise Built(text, {name: weight_type(weight) for name, weight in weights.items()})

    names = ("load", "load_all", "compile", "compile_reusing_mefs")
    before = {name: getattr(InferenceSession, name) for name in names}
    for name in names:
        setattr(InferenceSession, name, stop)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(InferenceSession, name, method)


def describe(text: str, weights: Mapping[str, str]) -> dict[str, Any]:
    """What is recorded of a graph: enough to say what has changed.

    Where our operations lie is no part of it, and neither is what is in them.
    """
    text = text.replace(str(kernel_package()), "unispec_kernels")
    listed = "\n".join(f"{name}: {kind}" for name, kind in weights.items())
    operations = Counter(re.findall(r"\b(r?mo\.[\w.]+)", text))
    return {
        "text": hashlib.sha256(text.encode()).hexdigest(),
        "lines": text.count("\n"),
        "operations": dict(sorted(operations.items())),
        "weights": len(weights),
        "weight names": hashlib.sha256(listed.encode()).hexdigest(),
    }


def _load(pair: TinyPair, *, alone: bool = False) -> None:
    draft = None if alone or pair.draft is None else str(pair.draft)
    speculative: dict[str, Any] = {
        "draft_model": draft,
        "speculative_method": pair.method,
        "draft_proposal": pair.draft_proposal,
        "use_relaxed_acceptance_for_thinking": pair.relaxed,
    }
    engine = Engine(
        EngineConfig(
            model=str(pair.target),
            max_batch_size=12,
            max_length=512,
            **({} if alone else speculative),
        )
    )
    engine.load()


def _modulev3(folder: Path) -> None:
    from modulev3 import Driver

    Driver(PRESETS["llama_eagle_agreeing"](folder).target)


GRAPHS: Mapping[str, Callable[[Path], None]] = {
    **{name: lambda folder, name=name: _load(PRESETS[name](folder)) for name in PRESETS},
    **{
        f"{name} alone": lambda folder, name=name: _load(PRESETS[name](folder), alone=True)
        for name in ("llama_eagle", "llama_eagle_biased", "deepseek_mtp_agreeing", "kimi_dflash")
    },
    "llama3_modulev3": _modulev3,
}
"""Each loads a model into a folder, which comes as far as the compilation."""

VIRTUAL: Mapping[str, tuple[str, ...]] = {
    "one GPU": ("1", "tensor"),
    "2 GPUs share all": ("2", "tensor"),
    "8 GPUs share all": ("8", "tensor"),
    "2 GPUs have some experts each": ("2", "expert"),
    "8 GPUs have one expert each": ("8", "expert"),
    "one GPU, late masks": ("1", "tensor", "--late-masks"),
    "2 GPUs have some experts each, late masks": ("2", "expert", "--late-masks"),
    "2 GPUs share all, FP8": ("2", "tensor", "--fp8"),
    "2 GPUs have some experts each, FP8": ("2", "expert", "--fp8"),
}
"""DeepSeek-V3 on GPUs that are not there: arguments of `virtual_gpus.py`.

The tests in `gpus/`, which build these graphs anyway, hold them against what is recorded.
"""


def build(name: str) -> Built:
    """The graph of this name in `GRAPHS`."""
    with tempfile.TemporaryDirectory() as folder:
        return _built(lambda: GRAPHS[name](Path(folder)))


def build_pair(pair: TinyPair, *, alone: bool = False) -> Built:
    """The graph of a target and its draft, or of the target alone."""
    return _built(lambda: _load(pair, alone=alone))


def _built(load: Callable[[], None]) -> Built:
    with nothing_compiled():
        try:
            load()
        except Built as built:
            return built
    raise AssertionError("a model was loaded without a graph")


def virtual(name: str) -> dict[str, Built]:
    """The graphs of this name in `VIRTUAL`: of target and draft, and of the target alone."""
    from deepseek_gpus import BLOCKS, SHAPE
    from tiny import in_fp8_blocks, tiny_deepseek

    count, parallelism, *options = VIRTUAL[name]
    script = Path(__file__).parent / "virtual_gpus.py"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "model"
        if "--fp8" in options:
            options.remove("--fp8")
            in_fp8_blocks(tiny_deepseek(folder, **BLOCKS, rope_interleave=False), (128, 128))
        else:
            tiny_deepseek(folder, **SHAPE)
        texts = Path(made) / "texts"
        texts.mkdir()
        subprocess.run(
            [sys.executable, script, count, folder, parallelism, *options, "--texts", texts],
            check=True,
            # Importing MAX changes what a child inherits where it is not given.
            env=dict(os.environ),
            stdout=subprocess.DEVNULL,
        )
        return {
            path.stem: Built(path.read_text(), json.loads(path.with_suffix(".json").read_text()))
            for path in sorted(texts.glob("*.txt"))
        }


def main(folder: Path, *, record: bool) -> None:
    built = {name: build(name) for name in GRAPHS}
    for name in VIRTUAL:
        built |= {f"{name}: {part}": found for part, found in virtual(name).items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in built.items():
        weights = "\n".join(f"{key}: {kind}" for key, kind in one.weights.items())
        (folder / f"{name}.txt").write_text(f"{one.text}\n{weights}\n")
    if record:
        found = {name: describe(one.text, one.weights) for name, one in built.items()}
        RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record", action="store_true")
    main(**vars(parser.parse_args()))
