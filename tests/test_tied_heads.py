"""`tie_word_embeddings: true` beside tensors that agree with it, and beside such that do not.

What is right is what transformers 5 makes of the same files: a head that differs from the embedding
is a head of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from max.driver import Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.nn.transformer import ReturnLogits
from modulev3 import pipeline_config
from reference.target import TargetReference
from safetensors.torch import load_file, save_file
from tiny import TinyPair

from unispec.checkpoints import read_tensors
from unispec.engine import Engine, EngineConfig
from unispec.pipelines.architectures.llama3_modulev3 import Llama3Config
from unispec.pipelines.architectures.llama3_modulev3.weights import state_dict
from unispec.pipelines.targets.llama.weights import llama3_state_dict

WEIGHTS = "model.safetensors"


class CompileReachedError(Exception):
    """Carries the weights of what would have been compiled."""

    def __init__(self, weights: dict[str, Any]) -> None:
        super().__init__()
        self.weights = weights


@pytest.fixture
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, weights_registry: dict[str, Any], **options: Any) -> None:
        raise CompileReachedError(dict(weights_registry))

    monkeypatch.setattr(InferenceSession, "load", load)
    monkeypatch.setattr(InferenceSession, "load_all", load)


def ask_for_a_tied_head(folder: Path, change: Callable[[str, str, dict[str, Any]], None]) -> Path:
    """Has config.json tie the head, and changes the tensors, of which it gets both names."""
    fields = json.loads((folder / "config.json").read_text())
    fields.get("text_config", fields)["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(fields))
    stored = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    (embedding,) = (n for n in stored if n.endswith("model.embed_tokens.weight"))
    head = embedding.replace("model.embed_tokens", "lm_head").replace(
        "language_lm_head", "language_model.lm_head"
    )
    change(embedding, head, stored)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def differ(embedding: str, head: str, stored: dict[str, Any]) -> None:
    """In the last row only, the last that a comparison sees."""
    stored[head] = stored[embedding].clone()
    stored[head][-1, -1] += 1


def same(embedding: str, head: str, stored: dict[str, Any]) -> None:
    stored[head] = stored[embedding].clone()


def head_only(embedding: str, head: str, stored: dict[str, Any]) -> None:
    stored[head] = stored.pop(embedding) + 1


def embedding_only(embedding: str, head: str, stored: dict[str, Any]) -> None:
    stored.pop(head, None)


def numbers(value: Any) -> Any:
    """A weight as an array; numpy has no bfloat16."""
    if isinstance(value, Buffer) and value.dtype == DType.bfloat16:
        return torch.from_dlpack(value).float().numpy()
    return np.asarray(value)


CHANGES = [differ, same, head_only, embedding_only]


@pytest.mark.parametrize("change", CHANGES)
def test_embedding_and_head_are_transformers(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, change: Any
) -> None:
    folder = Path(shutil.copytree(tiny_pair("llama_eagle").target, tmp_path / "target"))
    ask_for_a_tied_head(folder, change)
    target = TargetReference(folder)
    state = llama3_state_dict(
        read_tensors([folder / WEIGHTS]), target.model.config, source=str(folder)
    )
    embedding = state["embed_tokens.weight"]
    np.testing.assert_array_equal(embedding, target.embedding)
    np.testing.assert_array_equal(state.get("lm_head.weight", embedding), target.head)
    assert ("lm_head.weight" in state) == (change is differ)


GRAPHS = [
    (name, differ)
    for name in (
        "llama_eagle alone",
        "llama_eagle_bfloat16",
        "llama_dflash_windowed",
        "deepseek_mtp_agreeing",
        "deepseek_mtp_agreeing alone",
        "kimi_dflash",
        "kimi_dflash alone",
    )
]
GRAPHS += [
    ("llama_eagle_bfloat16", same),
    ("llama_eagle alone", head_only),
    ("deepseek_mtp_agreeing alone", head_only),
]


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize(("name", "change"), GRAPHS)
def test_every_graph_has_the_head_of_the_file(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, name: str, change: Any
) -> None:
    """And so has its draft: a smaller vocabulary has those rows of it."""
    preset, _, alone = name.partition(" ")
    pair = tiny_pair(preset)
    folder = Path(shutil.copytree(pair.target, tmp_path / "target"))
    ask_for_a_tied_head(folder, change)
    draft = None if alone or pair.draft is None else str(pair.draft)
    engine = Engine(
        EngineConfig(
            model=str(folder),
            draft_model=draft,
            speculative_method=None if alone else pair.method,
        )
    )
    with pytest.raises(CompileReachedError) as reached:
        engine.load()
    weights = {name: numbers(value) for name, value in reached.value.weights.items()}
    stored = {n.removeprefix("language_model."): t for n, t in load_file(folder / WEIGHTS).items()}
    embedding = stored.get("model.embed_tokens.weight", stored.get("lm_head.weight"))
    head = stored.get("lm_head.weight", embedding)
    assert embedding is not None
    assert head is not None
    np.testing.assert_array_equal(weights["target.embed_tokens.weight"], embedding.float())
    assert ("target.lm_head.weight" in weights) == (change is differ)
    if change is differ:
        np.testing.assert_array_equal(weights["target.lm_head.weight"], head.float())
    if "draft.d2t" in weights:
        rows = np.arange(len(weights["draft.d2t"])) + weights["draft.d2t"]
        np.testing.assert_array_equal(weights["draft.lm_head.weight"], head.float()[rows])


@pytest.mark.parametrize("change", CHANGES)
def test_a_modulev3_graph_has_the_head_of_the_file(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, change: Any
) -> None:
    folder = Path(shutil.copytree(tiny_pair("llama_eagle").target, tmp_path / "target"))
    ask_for_a_tied_head(folder, change)
    target, tensors = TargetReference(folder), read_tensors([folder / WEIGHTS])
    config = Llama3Config.initialize(pipeline_config(folder))
    config.finalize(target.model.config, tensors, ReturnLogits.LAST_TOKEN)
    assert config.tie_word_embeddings == (change is not differ)
    state = state_dict(tensors, config, source=str(folder))
    embedding = state["embed_tokens.weight"]
    np.testing.assert_array_equal(embedding, target.embedding)
    np.testing.assert_array_equal(state.get("lm_head.weight", embedding), target.head)
    assert ("lm_head.weight" in state) == (change is differ)
