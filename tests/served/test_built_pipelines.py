"""MAX builds our pipeline of every pair, on a CPU and on an H100 that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepseek_gpus import BLOCKS
from graph_texts import Built, nothing_compiled
from tiny import TinyPair, in_fp8_blocks, tiny_deepseek
from tiny.kimi import tiny_kimi, tiny_kimi_draft

from unispec.engine import EngineConfig
from unispec.engine.served_config import served_pipeline
from unispec.methods import FACTS
from unispec.pipelines.architectures.registry import pairs

TESTS = Path(__file__).parent.parent
PRESETS = {
    "llama eagle": "llama_eagle_agreeing",
    "llama eagle3": "llama_eagle3_agreeing",
    "llama dflash": "llama_dflash_windowed",
    "deepseek_v3 mtp": "deepseek_mtp_agreeing",
    "kimi_k25 dflash": "kimi_dflash",
    "mistral eagle": "mistral_eagle",
    "qwen2 eagle": "qwen2_eagle",
    "qwen3 dflash": "qwen3_dflash",
    "qwen3 eagle3": "qwen3_eagle3",
    "granite eagle": "granite_eagle",
}
"""A tiny pair of each target; the others differ from these in the target or the draft alone."""


def max_builds(where: str, asked: dict[str, list[Any]]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(TESTS / "served" / "max_builds.py"), where, json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def asked(pair: TinyPair, encoding: str) -> list[Any]:
    draft = None if pair.draft is None else str(pair.draft)
    return [str(pair.target), draft, FACTS[pair.method].max_method, 3, encoding]


def test_max_s_commands_build_every_pair_on_a_cpu(tiny_pair: Callable[[str], TinyPair]) -> None:
    """Our pipeline gets to the compilation of each graph, which reads the weights before."""
    found = max_builds(
        "cpu", {name: asked(tiny_pair(preset), "float32") for name, preset in PRESETS.items()}
    )
    assert found.keys() == PRESETS.keys()
    for name, result in found.items():
        assert result.get("pipeline") == "ServedPipeline", (name, result)
        assert result.get("on_gpu") is False, (name, result)
        # MAX asks for any EAGLE by one name; the draft's files say which it is.
        assert result["is_eagle3"] is name.endswith("eagle3"), (name, result)


def test_max_s_commands_build_pairs_on_an_h100(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    """DeepSeek-V3 needs wide attention there, and FP8, which MAX looks for in the files."""
    wide = tiny_deepseek(tmp_path / "wide", **BLOCKS)
    blocks = in_fp8_blocks(tiny_deepseek(tmp_path / "blocks", **BLOCKS), (128, 128))
    some = ("llama eagle", "llama eagle3", "llama dflash", "qwen2 eagle")
    requests = {name: asked(tiny_pair(PRESETS[name]), "bfloat16") for name in some}
    requests["deepseek_v3 mtp"] = [str(blocks), None, "mtp", 1, "float8_e4m3fn"]
    requests["in bfloat16"] = [str(wide), None, "mtp", 1, "bfloat16"]
    found = max_builds("cuda:sm_90a", requests)
    assert found.pop("manager") == "NoneType"  # nothing is allocated
    assert "'bfloat16' of" in found.pop("in bfloat16")["refused"]
    for name, result in found.items():
        assert result.get("pipeline") == "ServedPipeline", (name, result)
        assert result.get("on_gpu") is True, (name, result)


def test_max_s_commands_build_kimi_on_a_b200(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    kimi = tiny_kimi(tmp_path / "kimi", **{**BLOCKS, "n_group": 1})
    draft = tiny_kimi_draft(tmp_path / "draft", kimi, tmp_path / "scratch", head_dim=128)
    pair = asked(TinyPair(kimi, draft, "dflash"), "bfloat16")
    # What is allocated is looked at with the first one, which has one graph.
    first = asked(tiny_pair(PRESETS["llama eagle"]), "bfloat16")
    found = max_builds("cuda:sm_100a", {"llama": first, "kimi": pair})["kimi"]
    assert (found.get("pipeline"), found.get("on_gpu")) == ("ServedPipeline", True)


def test_every_target_is_among_them() -> None:
    """But one, whose stack is Mistral's."""
    targets = {pair.family.model_type for pair in pairs()}
    assert targets - {name.split()[0] for name in PRESETS} == {"ministral"}


@pytest.mark.parametrize("is_alone", [False, True], ids=["with its draft", "alone"])
@pytest.mark.parametrize("name", list(PRESETS))
def test_our_server_builds_every_pair(
    tiny_pair: Callable[[str], TinyPair], name: str, is_alone: bool
) -> None:
    """A target alone, too, which MAX's commands leave to MAX's own pipeline."""
    pair = tiny_pair(PRESETS[name])
    speculative: dict[str, Any] = {
        "draft_model": None if pair.draft is None else str(pair.draft),
        "speculative_method": pair.method,
        "draft_proposal": pair.draft_proposal,
    }
    served = served_pipeline(
        EngineConfig(
            model=str(pair.target),
            max_length=256,
            max_batch_size=3,
            **({} if is_alone else speculative),
        )
    )
    assert served.pipeline_config.runtime.enable_in_flight_batching
    assert served.pipeline_config.needs_bitmask_constraints
    with nothing_compiled(), pytest.raises(Built) as built:
        served.factory()
    assert any(name.startswith("draft.") for name in built.value.weights) is not is_alone
