"""Weights that cannot be used are refused in one line, before anything is compiled."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from damages import (
    SOUND,
    WEIGHTS,
    CompileReachedError,
    Damage,
    check,
    config,
    content,
    removed,
    run,
)
from safetensors.torch import load_file, save_file
from tiny import TinyPair

from unispec.checkpoints import memory
from unispec.engine import EngineConfig
from unispec.engine.pipeline_config import make_pipeline_config

Tensors = dict[str, torch.Tensor]


def tensors(part: str, change: Callable[[Tensors], object]) -> Damage:
    def damage(pair: TinyPair) -> None:
        file = getattr(pair, part) / WEIGHTS
        stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(stored)
        save_file(stored, file)

    return damage


def embedding(pair: TinyPair) -> torch.Tensor:
    return load_file(pair.target / WEIGHTS)["model.embed_tokens.weight"]


def spoilt(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda stored: stored[name].view(-1)[5].fill_(value)


def cut(part: str, size: int) -> Damage:
    """Keeps the first bytes of the weights, or all but the last for a negative size."""

    def damage(pair: TinyPair) -> None:
        file = getattr(pair, part) / WEIGHTS
        file.write_bytes(file.read_bytes()[:size])

    return damage


def both(*damages: Damage) -> Damage:
    return lambda pair: [damage(pair) for damage in damages]


def doubled_weights(pair: TinyPair) -> None:
    shutil.copy(pair.target / WEIGHTS, pair.target / "other.safetensors")
    (pair.target / WEIGHTS).rename(pair.target / "one.safetensors")


def weights_folder(pair: TinyPair) -> None:
    (pair.target / WEIGHTS).unlink()
    (pair.target / WEIGHTS).mkdir()


def larger_than_memory(pair: TinyPair) -> None:
    """141 GB that take no room on the disk."""
    size = 141 * 10**9
    entry = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    file = pair.target / WEIGHTS
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(file, file.stat().st_size + size)


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"

WEIGHT_CASES: Mapping[str, tuple[Damage, list[str]]] = {
    "no target weights": (removed("target", WEIGHTS), ["{target}", ".safetensors", "download"]),
    "no draft weights": (removed("draft", WEIGHTS), ["{draft}", ".safetensors", "download"]),
    "weights are a folder": (weights_folder, ["{target}", ".safetensors", "download"]),
    "target cut in its data": (
        cut("target", -100),
        ["{target}/model.safetensors is truncated", "again"],
    ),
    "target cut in its header": (
        cut("target", 50),
        ["{target}/model.safetensors is truncated", "50 bytes", "again"],
    ),
    "empty target weights": (
        cut("target", 0),
        ["{target}/model.safetensors", "0 bytes", "again"],
    ),
    "draft cut in its data": (
        cut("draft", -100),
        ["{draft}/model.safetensors is truncated", "again"],
    ),
    "a header nested deep": (
        content("target", WEIGHTS, struct.pack("<Q", 10**5) + b'{"a":' * 20_000),
        ["{target}/model.safetensors is not a safetensors file", "again"],
    ),
    "GGUF of a few bytes with 2^60 keys": (
        content("target", WEIGHTS, b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60) + b"\0" * 1200),
        ["{target}/model.safetensors", str(2**60), "metadata keys", "1200 bytes"],
    ),
    "a pickle": (
        content("target", WEIGHTS, b"\x80\x04pickle" * 100),
        ["{target}/model.safetensors", "not a safetensors", "convert"],
    ),
    "a pointer of Git LFS": (
        content("target", WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"),
        ["{target}/model.safetensors", "not a safetensors"],
    ),
    "GGUF under another name": (
        content("target", WEIGHTS, b"GGUF" + b"\xff" * 100),
        ["{target}/model.safetensors", "GGUF", "again"],
    ),
    "the checkpoint twice": (
        doubled_weights,
        ["{target}/one.safetensors", "{target}/other.safetensors", "one checkpoint only"],
    ),
    "target tensor of another shape": (
        tensors("target", lambda stored: stored.update({Q_PROJ: torch.ones(64, 65)})),
        ["{target}", Q_PROJ, "[64, 65]", "[64, 64]", "config.json"],
    ),
    "draft tensor of another shape": (
        tensors("draft", lambda stored: stored.update({"fc.weight": torch.ones(64, 64)})),
        ["{draft}", "fc.weight", "[64, 64]", "[64, 128]", "config.json"],
    ),
    "target tensor missing": (
        tensors("target", lambda stored: stored.pop("model.norm.weight")),
        ["{target} lacks", "norm.weight", "[64]", "all files"],
    ),
    "draft tensor missing": (
        tensors("draft", lambda stored: stored.pop("fc.weight")),
        ["{draft} lacks", "fc.weight", "[64, 128]", "all files"],
    ),
    "target tensor unknown": (
        tensors("target", lambda stored: stored.update({"model.extra": torch.ones(2)})),
        ["{target}", "'model.extra'", "does not have", "use a checkpoint"],
    ),
    "draft tensor unknown": (
        tensors("draft", lambda stored: stored.update({"embed_norm.weight": torch.ones(64)})),
        ["{draft}", "'embed_norm.weight'", "does not have", "use a checkpoint"],
    ),
    "target tensor of integers": (
        tensors("target", lambda stored: stored.update({Q_PROJ: stored[Q_PROJ].int()})),
        ["{target}", Q_PROJ, "int32", "not quantised"],
    ),
    "NaN in the target": (
        tensors("target", spoilt(Q_PROJ, float("nan"))),
        ["{target}", Q_PROJ, "1 NaN or infinite", "again"],
    ),
    "infinity in the draft": (
        tensors("draft", spoilt("fc.weight", float("inf"))),
        ["{draft}", "fc.weight", "1 NaN or infinite", "again"],
    ),
    "NaN in the draft": (
        tensors("draft", spoilt("fc.weight", float("nan"))),
        ["{draft}", "fc.weight", "1 NaN or infinite", "again"],
    ),
    "draft of another hidden size": (
        config("draft", hidden_size=96),
        ["hidden_size 96", "64", "trained for this target"],
    ),
    "draft of another vocabulary than its copy": (
        both(
            config("draft", vocab_size=300),
            tensors("draft", lambda stored: stored.update({"lm_head.weight": torch.ones(256, 64)})),
        ),
        ["{draft}", "'lm_head.weight'", "[256, 64]", "[300, 64]", "config.json that belongs"],
    ),
    "draft with the tokens under other ids": (
        lambda pair: tensors(
            "draft",
            lambda stored: stored.update(
                {"embed_tokens.weight": embedding(pair).roll(1, dims=0).contiguous()}
            ),
        )(pair),
        ["{draft}", "token 0 of 'embed_tokens.weight' is token 255 of the target", "tokenizer"],
    ),
    "a part of an EAGLE-3 draft": (
        tensors("draft", lambda stored: stored.update({"midlayer.x": torch.ones(2)})),
        ["{draft} lacks tensors", "'layers.0.hidden_norm.weight'", "give all files"],
    ),
    "a whole model as draft": (
        lambda pair: shutil.copytree(pair.target, pair.draft, dirs_exist_ok=True),
        ["{draft} is a whole language model", "`unispec train`"],
    ),
    "Medusa heads": (
        content("draft", "config.json", '{"model_type": "medusa"}'),
        ["{draft} is a set of Medusa heads", "use an EAGLE or DFlash draft"],
    ),
    "draft vocabulary without its map": (
        config("draft", draft_vocab_size=128),
        ["{draft}", "d2t", "128", "remove draft_vocab_size"],
    ),
}


@pytest.mark.parametrize(
    ("damage", "words"),
    WEIGHT_CASES.values(),
    ids=[name.replace(" ", "-") for name in WEIGHT_CASES],
)
def test_weights(pair: TinyPair, damage: Damage, words: list[str]) -> None:
    check(pair, damage, [], words)


def test_weights_larger_than_the_memory(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 24 * 10**9)
    words = ["{target}/model.safetensors", "need 282.0 GB", "has 24.0 GB free", "smaller model"]
    check(pair, larger_than_memory, [], words)


def test_weights_that_may_not_be_read(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == WEIGHTS:
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    check(pair, SOUND, [], ["{target}/model.safetensors", "Permission denied", "permissions"])


def test_links_into_a_cache_keep_their_names(pair: TinyPair) -> None:
    (pair.target / WEIGHTS).rename(pair.target / "blob")
    (pair.target / WEIGHTS).symlink_to("blob")
    config = make_pipeline_config(EngineConfig(model=str(pair.target)))
    assert config.model.weight_path == [pair.target / WEIGHTS]


def test_what_is_in_a_file_counts_and_not_its_name(pair: TinyPair) -> None:
    before = WEIGHTS
    for word in ("bf16", "fp16", "f32", "fp8", "fp4", "gptq", "q4_0", "q6_k"):
        name = f"model-{word}.safetensors"
        for folder in (pair.target, pair.draft):
            assert folder is not None
            (folder / before).rename(folder / name)
        before = name
        config = make_pipeline_config(
            EngineConfig(
                model=str(pair.target), draft_model=str(pair.draft), speculative_method="eagle"
            )
        )
        for model in (config.model, config.draft_model):
            assert model is not None
            assert [path.name for path in model.weight_path] == [name]
            assert model.quantization_encoding == "float32"
    (pair.target / before).rename(pair.target / "model-bf16.safetensors")
    with pytest.raises(CompileReachedError):
        run(pair)
