"""Every bad input through the command line: one clear line, status 2, and never a compile."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hub import running_hub
from max.engine import InferenceSession
from max.pipelines.context import SamplingParams
from max.pipelines.lib import PipelineArgs, PipelineConfig
from PIL import Image
from runs import run_python
from safetensors.torch import load_file, save_file
from tiny import TinyPair
from tiny.kimi import MEDIA_PAD, tiny_kimi

from unispec.checkpoints import memory
from unispec.cli import unispec
from unispec.engine import Engine, EngineConfig, Request
from unispec.errors import InputError

PROGRESS = re.compile(r" *\d+\.\d s  \S")
WEIGHTS = "model.safetensors"

Damage = Callable[[TinyPair], object]
Tensors = dict[str, torch.Tensor]


class CompileReachedError(BaseException):
    """Nothing on the way catches it."""


@pytest.fixture(autouse=True)
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise CompileReachedError

    monkeypatch.setattr(InferenceSession, "load", load)
    monkeypatch.setattr(InferenceSession, "load_all", load)


@pytest.fixture
def pair(tiny_pair: Callable[[str], TinyPair], tmp_path: Path) -> TinyPair:
    """A sound target (hidden 64, 256 tokens, 512 positions) and its draft, to be damaged."""
    sound = tiny_pair("llama_eagle")
    return TinyPair(
        *(shutil.copytree(path, tmp_path / path.name) for path in (sound.target, sound.draft))
    )


def run(pair: TinyPair, *flags: str) -> Result:
    """Runs `unispec generate`; a later flag overrides an earlier one."""
    arguments = ["generate", "--model", str(pair.target), "--draft-model-path", str(pair.draft)]
    arguments += ["--speculative-method", "eagle", "--prompt", "hello", *flags]
    return CliRunner().invoke(unispec, arguments, catch_exceptions=False)


def assert_refused(status: int, stdout: str, stderr: str, *words: str) -> None:
    """Asserts status 2 and, progress aside, one line on stderr that holds these words."""
    assert (status, stdout) == (2, "")
    lines = [line for line in stderr.splitlines() if not PROGRESS.match(line)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


# Damages


def config(part: str, **changes: object) -> Damage:
    """Changes fields of a config.json; ... removes one."""

    def damage(pair: TinyPair) -> None:
        file = getattr(pair, part) / "config.json"
        fields = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))

    return damage


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


def content(part: str, name: str, text: str | bytes) -> Damage:
    data = text.encode() if isinstance(text, str) else text
    return lambda pair: (getattr(pair, part) / name).write_bytes(data)


def cut(part: str, size: int) -> Damage:
    """Keeps the first bytes of the weights, or all but the last for a negative size."""

    def damage(pair: TinyPair) -> None:
        file = getattr(pair, part) / WEIGHTS
        file.write_bytes(file.read_bytes()[:size])

    return damage


def removed(part: str, *names: str) -> Damage:
    return lambda pair: [(getattr(pair, part) / name).unlink() for name in names]


def renamed(name: str) -> Damage:
    return lambda pair: (pair.target / WEIGHTS).rename(pair.target / name)


def both(*damages: Damage) -> Damage:
    return lambda pair: [damage(pair) for damage in damages]


def doubled_weights(pair: TinyPair) -> None:
    shutil.copy(pair.target / WEIGHTS, pair.target / "other.safetensors")
    (pair.target / WEIGHTS).rename(pair.target / "one.safetensors")


def weights_folder(pair: TinyPair) -> None:
    (pair.target / WEIGHTS).unlink()
    (pair.target / WEIGHTS).mkdir()


def truncated_gguf(pair: TinyPair) -> None:
    writer = gguf.GGUFWriter(pair.target / "cut.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (pair.target / "cut.gguf").write_bytes((pair.target / "cut.gguf").read_bytes()[:-1000])


def larger_than_memory(pair: TinyPair) -> None:
    """141 GB that take no room on the disk."""
    size = 141 * 10**9
    entry = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    file = pair.target / WEIGHTS
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(file, file.stat().st_size + size)


SOUND: Damage = lambda pair: None  # noqa: E731
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
    "an EAGLE-3 draft": (
        tensors("draft", lambda stored: stored.update({"midlayer.x": torch.ones(2)})),
        ["{draft} is an EAGLE-3 draft", "not supported yet", "use an EAGLE-1"],
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

CONFIG_CASES: Mapping[str, tuple[Damage, list[str]]] = {
    "no config.json": (removed("target", "config.json"), ["{target} has no config.json", "give"]),
    "no draft config.json": (removed("draft", "config.json"), ["{draft} has no config.json"]),
    "config.json is no JSON": (
        content("target", "config.json", "{"),
        ["{target}", "config.json is no JSON", "again"],
    ),
    "config.json is binary": (
        content("draft", "config.json", b"\xff\xfe\0"),
        ["{draft}", "config.json is no JSON", "again"],
    ),
    "config.json is a list": (
        content("target", "config.json", "[]"),
        ["{target}", "config.json is a JSON list", "again"],
    ),
    "draft config.json without fields": (
        content("draft", "config.json", "{}"),
        ["{draft}", "model_type None", "Llama"],
    ),
    "draft config.json with a type only": (
        content("draft", "config.json", '{"model_type": "llama"}'),
        ["{draft}", "does not state hidden_size", "the checkpoint's own"],
    ),
    "vocabulary not stated": (
        config("target", vocab_size=...),
        ["{target}", "does not state vocab_size", "the checkpoint's own"],
    ),
    "another architecture": (
        config("target", model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        ["{target}", "gpt2 with eagle", "supported: deepseek_v3 with mtp", "llama with eagle"],
    ),
    "an architecture that only MAX knows": (
        config("target", model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
        ["qwen2 with eagle", "supported: deepseek_v3 with mtp", "llama with eagle"],
    ),
    "an architecture that nobody knows": (
        config("target", model_type="fancy", auto_map={"AutoConfig": "code.Config"}),
        ["{target}", "model_type fancy with eagle", "llama with eagle"],
    ),
    "a part that no Llama has": (
        config("target", text_config={"hidden_size": 64}),
        ["{target}", "a llama has no text_config", "correct config.json"],
    ),
    "draft classes that are an object": (
        config("draft", architectures={}),
        ["{draft}", "architectures {}", "no list of names", "correct"],
    ),
    "draft classes that are no list": (
        config("draft", architectures="LlamaForCausalLM"),
        ["{draft}", "architectures 'LlamaForCausalLM'", "no list of names", "correct"],
    ),
    "a part that is no object": (
        config("target", text_config="x"),
        ["{target}", "text_config 'x'", "no JSON object", "correct"],
    ),
    "classes of its own that are a number": (
        config("target", auto_map=-1),
        ["{target}", "auto_map -1", "no JSON object", "correct"],
    ),
    "no architecture": (
        config("target", architectures=...),
        ["{target}", "architectures", "None", "correct"],
    ),
    "rope type": (
        config("target", rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        ["{target}", "rope type 'yarn'", "'llama3'"],
    ),
    "draft rope type": (
        config("draft", rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        ["{draft}", "rope type 'yarn'", "'llama3'"],
    ),
    "rope scaling not complete": (
        config("target", rope_scaling={"rope_type": "llama3", "factor": 2.0}),
        ["{target}", "low_freq_factor", "correct"],
    ),
    "rope scaling is text": (
        config("target", rope_scaling="linear"),
        ["{target}", "'linear'", "correct"],
    ),
    "rope type of no unified graph": (
        config(
            "target",
            rope_scaling={
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
            },
        ),
        ["{target}", "rope type 'longrope'", "use a checkpoint"],
    ),
    "constant of no unified graph": (
        config("draft", residual_multiplier=0.5),
        ["{draft}", "residual_multiplier", "0.5", "use a Llama"],
    ),
    "rope theta is text": (config("target", rope_theta="x"), ["{target}", "rope_theta 'x'"]),
    "rope theta is NaN": (
        config("target", rope_theta=float("nan")),
        ["{target}", "rope_theta nan", "correct"],
    ),
    "epsilon is NaN": (
        config("draft", rms_norm_eps=float("nan")),
        ["{draft}", "rms_norm_eps nan", "correct"],
    ),
    "epsilon is text": (
        config("target", rms_norm_eps="small"),
        ["{target}", "rms_norm_eps", "'small'", "correct"],
    ),
    "activation": (config("target", hidden_act="gelu"), ["{target}", "'gelu'", "'silu'", "use"]),
    "draft activation": (config("draft", hidden_act="gelu"), ["{draft}", "'gelu'", "'silu'"]),
    "MLP bias": (config("target", mlp_bias=True), ["{target}", "mlp_bias True", "use"]),
    "quantised": (
        config("target", quantization_config={"quant_method": "gptq", "bits": 4}),
        ["{target}", "quantization_config", "GGUF"],
    ),
    "no heads": (
        config("target", num_attention_heads=0),
        ["{target}", "num_attention_heads 0", "correct"],
    ),
    "heads are text": (
        config("target", num_attention_heads="4"),
        ["{target}", "num_attention_heads '4'", "correct"],
    ),
    "hidden size is NaN": (
        config("draft", hidden_size=float("nan")),
        ["{draft}", "hidden_size nan", "correct"],
    ),
    "no key heads": (
        config("target", num_key_value_heads=0),
        ["{target}", "num_key_value_heads 0", "correct"],
    ),
    "key heads that do not divide": (
        config("target", num_key_value_heads=3),
        ["{target}", "num_attention_heads 4", "num_key_value_heads 3", "correct"],
    ),
    "odd head width": (config("target", head_dim=15), ["{target}", "head_dim 15", "correct"]),
    "a billion layers of the target": (
        config("target", num_hidden_layers=10**9),
        ["{target}", "num_hidden_layers 1000000000", "at most 1000", "correct"],
    ),
    "a billion layers of the draft": (
        config("draft", num_hidden_layers=10**9),
        ["{draft}", "num_hidden_layers 1000000000", "at most 1000", "correct"],
    ),
    "a billion experts": (
        config("target", text_config={"n_routed_experts": 10**9}),
        ["{target}", "n_routed_experts 1000000000", "at most 1000", "correct"],
    ),
    "a billion positions": (
        config("target", max_position_embeddings=10**9),
        ["{target}", "max_position_embeddings 1000000000", "max_length of at most 16777216"],
    ),
    "a number that is not finite": (
        config("target", rope_theta=math.inf),
        ["{target}", "config.json", "rope_theta inf", "correct"],
    ),
    "a configuration nested deep": (
        content("target", "config.json", '{"a":' * 3000 + "1" + "}" * 3000),
        ["{target}", "config.json", "again"],
    ),
    "generation defaults nested deep": (
        content("target", "generation_config.json", '{"a":' * 3000 + "1" + "}" * 3000),
        ["{target}", "generation_config.json", "correct or remove"],
    ),
    "a tokenizer nested deep": (
        content("target", "tokenizer.json", '{"a":' * 3000 + "1" + "}" * 3000),
        ["{target}", "tokenizer.json", "again"],
    ),
    "no layers": (
        config("target", num_hidden_layers=-1),
        ["{target}", "num_hidden_layers -1", "correct"],
    ),
    "more layers than tensors": (
        config("target", num_hidden_layers=3),
        ["{target} lacks", "layers.2.", "config.json"],
    ),
    "fewer layers than tensors": (
        config("target", num_hidden_layers=1),
        ["{target}", "model.layers.1.", "does not have", "config.json"],
    ),
    "no positions": (
        config("target", max_position_embeddings=0),
        ["{target}", "max_position_embeddings 0", "correct"],
    ),
    "EOS is text": (config("target", eos_token_id="x"), ["{target}", "eos_token_id", "'x'"]),
    "no tokenizer": (
        removed("target", "tokenizer.json", "tokenizer_config.json"),
        ["{target} has no tokenizer.json", "tokenizer.model", "copy"],
    ),
    "no tokenizer.json": (
        removed("target", "tokenizer.json"),
        ["{target} has no tokenizer.json", "tokenizer.model", "copy"],
    ),
    "tokenizer.json is no JSON": (
        content("target", "tokenizer.json", "{"),
        ["tokenizer of {target}", "line 1", "download"],
    ),
    "tokenizer.json is no tokenizer": (
        content("target", "tokenizer.json", "{}"),
        ["tokenizer of {target}", "download"],
    ),
    "tokenizer.json of an unknown model": (
        content("target", "tokenizer.json", '{"added_tokens": [], "model": {"type": "magic"}}'),
        ["tokenizer of {target}", "download"],
    ),
    "tokenizer_config.json is a list": (
        content("target", "tokenizer_config.json", "[]"),
        ["tokenizer of {target}", "download"],
    ),
    "generation_config.json is no JSON": (
        content("target", "generation_config.json", "{"),
        ["{target}/generation_config.json", "line 1", "correct or remove"],
    ),
    "generation_config.json with an EOS token beyond the vocabulary": (
        content("target", "generation_config.json", '{"eos_token_id": [2, 256]}'),
        ["eos_token_id [2, 256]", "generation_config.json", "{target}", "vocabulary of 256"],
    ),
    "generation_config.json with an EOS token by its name": (
        content("target", "generation_config.json", '{"eos_token_id": "</s>"}'),
        ["eos_token_id '</s>'", "generation_config.json", "{target}", "correct the file"],
    ),
    "generation_config.json out of range": (
        content("target", "generation_config.json", '{"top_p": 2}'),
        ["generation_config.json", "top_p", "2", "give the option"],
    ),
    "chat template that cannot be parsed": (
        content(
            "target",
            "tokenizer_config.json",
            '{"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{% for"}',
        ),
        ["chat template", "end of template", "--no-chat-template"],
    ),
    "chat template that breaks down": (
        content(
            "target",
            "tokenizer_config.json",
            '{"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ 1 + messages }}"}',
        ),
        ["chat template", "unsupported operand", "--no-chat-template"],
    ),
}

CHAINED = json.dumps(
    {"$ref": "#/$defs/0"}
    | {"$defs": {str(at): {"$ref": f"#/$defs/{at + 1}"} for at in range(5000)} | {"5000": {}}}
)

FLAG_CASES: Mapping[str, tuple[Damage, list[str], list[str]]] = {
    "model that is not there": (SOUND, ["--model", "/nowhere/m"], ["/nowhere/m", "check"]),
    "relative model": (SOUND, ["--model", "nowhere"], ["nowhere does not exist", "check"]),
    "nested model": (SOUND, ["--model", "a/b/c"], ["a/b/c does not exist", "check"]),
    "empty model": (SOUND, ["--model", ""], ["empty", "give"]),
    "model of an unknown user": (SOUND, ["--model", "~no-one/m"], ["~no-one/m", "check"]),
    "model with an endless name": (SOUND, ["--model", "/" + "a" * 5000], ["aaa", "check"]),
    "model is a file": (
        SOUND,
        ["--model", "{target}/config.json"],
        ["{target}/config.json is a file", "folder"],
    ),
    "no repository's name": (SOUND, ["--model", "a b/c"], ["a b/c", "check the path"]),
    "draft that is not there": (SOUND, ["--draft-model-path", "./d"], ["./d", "check"]),
    "weight path that is not there": (
        SOUND,
        ["--weight-path", "{target}/none.gguf"],
        ["--weight-path", "{target}/none.gguf", "does not exist"],
    ),
    "weight path of another format": (
        renamed("pytorch_model.bin"),
        ["--weight-path", "{target}/pytorch_model.bin"],
        ["{target}/pytorch_model.bin", "unknown format", "give .safetensors"],
    ),
    "damaged GGUF": (
        content("target", "bad.gguf", b"GGUF" + b"\xff" * 500),
        ["--weight-path", "{target}/bad.gguf"],
        ["{target}/bad.gguf", "damaged GGUF", "again"],
    ),
    "truncated GGUF": (
        truncated_gguf,
        ["--weight-path", "{target}/cut.gguf"],
        ["{target}/cut.gguf", "truncated", "again"],
    ),
    "no GGUF at all": (
        content("target", "text.gguf", "hello, world"),
        ["--weight-path", "{target}/text.gguf"],
        ["{target}/text.gguf", "not a safetensors", "convert"],
    ),
    "GGUF beside safetensors": (
        truncated_gguf,
        ["--weight-path", "{target}/cut.gguf", "--weight-path", "{target}/model.safetensors"],
        ["2 weight files", "GGUF", "alone"],
    ),
    "K = 0": (SOUND, ["--num-speculative-tokens", "0"], ["-tokens'", "0", "x>=1"]),
    "K = 9": (SOUND, ["--num-speculative-tokens", "9"], ["-tokens 9", "1<=x<=8", "eagle"]),
    "unknown method": (
        SOUND,
        ["--speculative-method", "oracle"],
        ["--speculative-method", "'oracle'", "'eagle'"],
    ),
    "max_length beyond the model": (
        SOUND,
        ["--max-length", "513"],
        ["max_length 513", "max_position_embeddings 512", "choose at most 512"],
    ),
    "max_length beyond the model, alone": (
        SOUND,
        ["--max-length", "513", "--no-speculation"],
        ["max_length 513", "max_position_embeddings 512", "choose at most 512"],
    ),
    "unknown device": (SOUND, ["--devices", "gpuu"], ["--devices", "'gpuu'", "'gpu:ID'"]),
    "no GPU": (SOUND, ["--devices", "gpu"], ["devices 'gpu'", "0 GPUs", "use 'cpu'"]),
    "no such GPU": (SOUND, ["--devices", "gpu:7"], ["devices 'gpu:7'", "0 GPUs", "use 'cpu'"]),
    "unknown encoding": (
        SOUND,
        ["--quantization-encoding", "q4_k"],
        ["--quantization-encoding", "'q4_k'", "'float32'"],
    ),
    "encoding that a CPU lacks": (
        SOUND,
        ["--quantization-encoding", "bfloat16"],
        ["'bfloat16'", "'cpu'", "use 'float32'"],
    ),
    "schema is no JSON": (
        content("target", "schema", "{"),
        ["--json-schema", "{target}/schema"],
        ["--json-schema", "{target}/schema", "line 1"],
    ),
    "schema of an unknown type": (
        content("target", "schema", '{"type": "strin"}'),
        ["--json-schema", "{target}/schema"],
        ["JSON schema", "strin", "give"],
    ),
    "schema nested 3,000 deep": (
        content("target", "schema", '{"a":' * 3000 + "1" + "}" * 3000),
        ["--json-schema", "{target}/schema"],
        ["schema", "nested", "deep"],
    ),
    "schema of 5,000 chained references": (
        content("target", "schema", CHAINED),
        ["--json-schema", "{target}/schema"],
        ["JSON schema", "more than 1000 of its references", "give"],
    ),
    "schema with a number that is rounded": (
        content("target", "schema", '{"maximum": 9007199254740993}'),
        ["--json-schema", "{target}/schema"],
        ["JSON schema", "maximum 9007199254740993", "2^53", "give"],
    ),
    "regex that is not closed": (SOUND, ["--regex", "("], ["regex '('", "unclosed", "give"]),
    "regex with look-ahead": (SOUND, ["--regex", "(?=a)b"], ["'(?=a)b'", "look-a", "give"]),
    "negative temperature": (SOUND, ["--temperature", "-1"], ["--temperature", "-1", "0<=x<=2"]),
    "top_p < 0": (SOUND, ["--top-p", "-0.1"], ["--top-p", "-0.1", "0<=x<=1"]),
    "top_p > 1": (SOUND, ["--top-p", "1.1"], ["--top-p", "1.1", "0<=x<=1"]),
    "endless top_k": (
        SOUND,
        ["--top-k", "9" * 20],
        ["--top-k", "9" * 20, f"x<={2**63 - 1}"],
    ),
    "seed beyond 64 bits": (SOUND, ["--seed", str(2**64)], ["--seed", str(2**64), "range"]),
    "empty prompt": (SOUND, ["--prompt", ""], ["--prompt is empty", "give"]),
    "prompt as long as max_length": (
        SOUND,
        ["--prompt", "hello", "--max-length", "5"],
        ["prompt 1 has 5 tokens", "max_length is 5", "shorten"],
    ),
    "prompt beyond max_length": (
        SOUND,
        ["--prompt", "x " * 400],
        ["prompt 1 has 800 tokens", "max_length is 512", "shorten"],
    ),
    "too few pages": (
        SOUND,
        ["--kv-cache-pages", "1", "--max-new-tokens", "300"],
        ["prompt 1", "305 tokens", "3 cache pages", "kv_cache_pages is 1", "raise"],
    ),
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unispec.engine.config.accelerator_count", lambda: 0)


def check(pair: TinyPair, damage: Damage, flags: list[str], words: list[str]) -> None:
    damage(pair)
    names: dict[str, Any] = {"{target}": pair.target, "{draft}": pair.draft}

    def resolved(text: str) -> str:
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    result = run(pair, *map(resolved, flags))
    assert_refused(result.exit_code, result.stdout, result.stderr, *map(resolved, words))


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


@pytest.mark.parametrize(
    ("damage", "words"),
    CONFIG_CASES.values(),
    ids=[name.replace(" ", "-") for name in CONFIG_CASES],
)
def test_configuration_files(pair: TinyPair, damage: Damage, words: list[str]) -> None:
    check(pair, damage, [], words)


@pytest.mark.parametrize(
    ("damage", "flags", "words"),
    FLAG_CASES.values(),
    ids=[name.replace(" ", "-") for name in FLAG_CASES],
)
def test_flags(pair: TinyPair, damage: Damage, flags: list[str], words: list[str]) -> None:
    check(pair, damage, flags, words)


def test_draft_of_another_target(pair: TinyPair, tiny_pair: Callable[[str], TinyPair]) -> None:
    check(
        pair,
        SOUND,
        ["--draft-model-path", str(tiny_pair("llama_eagle_biased").draft)],
        ["hidden_size 96", "64", "trained for this target"],
    )


def test_tokenizer_of_another_model(pair: TinyPair, tiny_pair: Callable[[str], TinyPair]) -> None:
    shutil.copy(tiny_pair("llama_eagle_bfloat16").target / "tokenizer.json", pair.target)
    check(pair, SOUND, ["--prompt", "an"], ["prompt 1", "token id", "256", "the tokenizer that"])


def test_weights_that_may_not_be_read(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == WEIGHTS:
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    check(pair, SOUND, [], ["{target}/model.safetensors", "Permission denied", "permissions"])


def test_a_machine_with_fewer_gpus(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unispec.engine.config.accelerator_count", lambda: 2)
    check(pair, SOUND, ["--devices", "gpu:2"], ["'gpu:2'", "2 GPUs", "'gpu:0' to 'gpu:1'"])


@pytest.mark.parametrize("flag", ["--model", "--draft-model-path"])
def test_the_hub_does_not_have_it(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str
) -> None:
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        words = ["no-one/nothing is neither", "check the path", "log in"]
        check(pair, SOUND, [flag, "no-one/nothing"], words)
        hub.go_down()
        words = ["no-one/nothing", "(", "Connection refused", ")", "path and the network"]
        check(pair, SOUND, [flag, "no-one/nothing"], words)


def test_a_process_of_its_own_with_the_hub_switched_off(pair: TinyPair) -> None:
    command = [sys.executable, "-m", "unispec.cli", "generate", "--prompt", "hello"]
    command += ["--model", str(pair.target), "--draft-model-path", "no-one/nothing"]
    command += ["--speculative-method", "eagle"]
    # MAX sets PYTHONEXECUTABLE behind Python's back; a child must not inherit it.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert_refused(
        done.returncode,
        done.stdout,
        done.stderr,
        "no-one/nothing is no local folder",
        "check the path",
    )


def test_a_wrong_path_is_told_before_anything_slow_is_imported(
    pair: TinyPair, tmp_path: Path
) -> None:
    """MAX, transformers and torch take seconds each."""
    (pair.target / WEIGHTS).rename(pair.target / "pytorch_model.bin")
    good = ["--draft-model-path", str(pair.draft), "--speculative-method", "eagle"]
    train = ["train", "--output", str(tmp_path / "out"), "--speculative-method", "eagle"]
    generate = ["generate", "--prompt", "hello"]
    commands = {
        "folder /nowhere/m does not exist": [*generate, "--model", "/nowhere/m"],
        "folder /nowhere/t does not exist": [*train, "--model", "/nowhere/t"],
        f"{tmp_path} has no config.json": [*generate, "--model", str(tmp_path)],
        f"{pair.target} holds no .safetensors": [*generate, "--model", str(pair.target), *good],
        "folder /nowhere/d does not exist": [
            *[*generate, "--model", str(pair.draft), *good],
            *["--draft-model-path", "/nowhere/d"],
        ],
    }
    said = run_python(WITHOUT_IMPORTS, json.dumps([*commands.values()]))
    lines, imported = json.loads(said)
    for expected, line in zip(commands, lines, strict=True):
        assert line.startswith(f"error: {expected}"), line
    assert imported == []


WITHOUT_IMPORTS = """
import json, sys
from click.testing import CliRunner
from unispec.cli import unispec

lines = [CliRunner().invoke(unispec, command).stderr for command in json.loads(sys.argv[1])]
imported = sorted({"max", "numpy", "torch", "transformers"} & set(sys.modules))
print(json.dumps([lines, imported]))
"""


def test_what_is_sound_reaches_the_compile(pair: TinyPair) -> None:
    with pytest.raises(CompileReachedError):
        run(pair, "--seed", str(2**64 - 1), "--max-length", "512", "--num-speculative-tokens", "8")


def test_links_into_a_cache_keep_their_names(pair: TinyPair) -> None:
    (pair.target / WEIGHTS).rename(pair.target / "blob")
    (pair.target / WEIGHTS).symlink_to("blob")
    config = EngineConfig(model=str(pair.target)).pipeline_config()
    assert config.model.weight_path == [pair.target / WEIGHTS]


def test_what_is_in_a_file_counts_and_not_its_name(pair: TinyPair) -> None:
    before = WEIGHTS
    for word in ("bf16", "fp16", "f32", "fp8", "fp4", "gptq", "q4_0", "q6_k"):
        name = f"model-{word}.safetensors"
        for folder in (pair.target, pair.draft):
            assert folder is not None
            (folder / before).rename(folder / name)
        before = name
        config = EngineConfig(
            model=str(pair.target), draft_model=str(pair.draft), speculative_method="eagle"
        ).pipeline_config()
        for model in (config.model, config.draft_model):
            assert model is not None
            assert [path.name for path in model.weight_path] == [name]
            assert model.quantization_encoding == "float32"
    (pair.target / before).rename(pair.target / "model-bf16.safetensors")
    with pytest.raises(CompileReachedError):
        run(pair)


# Images


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound Kimi K2.5 with a chat template."""
    return tiny_kimi(tmp_path_factory.mktemp("seeing"))


def png(path: Path, size: tuple[int, int] = (30, 30), mode: str = "RGB") -> Path:
    Image.new(mode, size).save(path, "PNG")
    return path


def look(model: Path, prompt: str, *images: Path, flags: Sequence[str] = ()) -> Result:
    """Runs `unispec generate` with images."""
    given = [flag for image in images for flag in ("--image", str(image))]
    arguments = ["generate", "--model", str(model), "--prompt", prompt, *given, *flags]
    return CliRunner().invoke(unispec, arguments, catch_exceptions=False)


@pytest.mark.parametrize("count", [1, 2])
def test_images_with_their_placeholders_reach_the_compile(
    seeing: Path, tmp_path: Path, count: int
) -> None:
    files = [png(tmp_path / f"{index}.png") for index in range(count)]
    with pytest.raises(CompileReachedError):
        look(seeing, "what is it?", *files)
    with pytest.raises(CompileReachedError):
        look(seeing, "what" + MEDIA_PAD * count, *files, flags=["--no-chat-template"])


def test_images_that_cannot_be_read(seeing: Path, tmp_path: Path) -> None:
    whole = png(tmp_path / "whole.png", (300, 300))
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    text = tmp_path / "text.png"
    text.write_text("hello")
    (tmp_path / "empty.png").touch()
    for file, words in (
        (cut, ["image 2 of prompt 1", "cannot be read", "that is whole"]),
        (text, ["cannot be read as PNG, JPEG or WebP"]),
        (tmp_path / "empty.png", ["cannot be read as PNG, JPEG or WebP"]),
    ):
        result = look(seeing, "what is it?", whole, file)
        words.append(str(file))
        assert_refused(result.exit_code, result.stdout, result.stderr, *words)


def test_a_huge_image(seeing: Path, tmp_path: Path) -> None:
    """It is not decoded. Pillow itself refuses 2 * 89,478,485 pixels or more."""
    for size, pixels in (((20000, 9000), "180,000,000"), ((8000, 5001), "40,008,000")):
        huge = png(tmp_path / "huge.png", size, "1")
        result = look(seeing, "what is it?", huge)
        words = [str(huge), f"{pixels} pixels", "may have 40,000,000", "make it smaller"]
        assert_refused(result.exit_code, result.stdout, result.stderr, *words)


def test_an_image_that_leaves_no_room_for_an_answer(seeing: Path, tmp_path: Path) -> None:
    large = png(tmp_path / "large.png", (560, 560))  # 20 * 20 features
    result = look(seeing, "x", large, flags=["--max-length", "256"])
    words = ["prompt 1 has", "max_length is 256", "shorten"]
    assert_refused(result.exit_code, result.stdout, result.stderr, *words)


@pytest.mark.parametrize(("given", "placeholders"), [(1, 0), (0, 1), (1, 2), (2, 1)])
def test_more_or_fewer_images_than_placeholders(
    seeing: Path, tmp_path: Path, given: int, placeholders: int
) -> None:
    files = [png(tmp_path / f"{index}.png") for index in range(given)]
    result = look(seeing, "see " + MEDIA_PAD * placeholders, *files, flags=["--no-chat-template"])
    words = [
        f"prompt 1 has {placeholders} image placeholders",
        f"{given} images",
        "one image for each",
    ]
    assert_refused(result.exit_code, result.stdout, result.stderr, *words)


def test_an_image_for_a_model_that_reads_none(pair: TinyPair, tmp_path: Path) -> None:
    result = run(pair, "--image", str(png(tmp_path / "cat.png")))
    words = ["--image", str(pair.target), "reads no images"]
    assert_refused(result.exit_code, result.stdout, result.stderr, *words)


# What only a program can ask for


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_speculative_tokens": 0}, ["num_speculative_tokens is 0", "choose 1 to 8"]),
        ({"num_speculative_tokens": 9}, ["num_speculative_tokens is 9", "choose 1 to 8"]),
        ({"speculative_method": "oracle"}, ["'oracle'", "known: dflash, eagle"]),
        ({"speculative_method": None}, ["draft model draft", "give both"]),
        ({"draft_model": None}, ["'eagle' needs a draft model"]),
        ({"speculative_method": "mtp"}, ["draft model draft", "'mtp'", "leave it out"]),
        ({"draft_proposal": "guess"}, ["'guess'", "argmax, sampled"]),
        (
            {"draft_proposal": "sampled", "use_relaxed_acceptance_for_thinking": True},
            ["'sampled'", "exclude each other", "use 'argmax'"],
        ),
        (
            {
                "draft_model": None,
                "speculative_method": None,
                "use_relaxed_acceptance_for_thinking": True,
            },
            ["use_relaxed_acceptance_for_thinking needs", "leave it out"],
        ),
        (
            {"use_relaxed_acceptance_for_thinking": True, "relaxed_topk": 0},
            ["relaxed_topk is 0", "at least 1"],
        ),
        (
            {"use_relaxed_acceptance_for_thinking": True, "relaxed_delta": 1.5},
            ["relaxed_delta is 1.5", "choose 0 to 1"],
        ),
        (
            {"use_relaxed_acceptance_for_thinking": True, "thinking_tokens": ("<a>", "<a>")},
            ["thinking_tokens is ('<a>', '<a>')", "two different tokens"],
        ),
        (
            {"draft_model": None, "speculative_method": None, "num_speculative_tokens": 3},
            ["num_speculative_tokens is 3", "no speculative method", "leave it out"],
        ),
        ({"max_batch_size": 0}, ["max_batch_size is 0", "at least 1"]),
        ({"max_batch_input_tokens": 0}, ["max_batch_input_tokens is 0", "at least 1"]),
        ({"max_length": 0}, ["max_length is 0", "at least 1"]),
        ({"kv_cache_pages": -1}, ["kv_cache_pages is -1", "at least 1"]),
        *[
            ({name: value}, [f"{name} is {value!r}; give an integer"])
            for name in ("max_length", "max_batch_size", "max_batch_input_tokens", "kv_cache_pages")
            for value in ("3", 2.5, math.nan, [1], True)
        ],
        ({"max_batch_size": None}, ["max_batch_size is None; give an integer"]),
        ({"num_speculative_tokens": 2.5}, ["num_speculative_tokens is 2.5; give an integer"]),
        ({"enable_prefix_caching": "no"}, ["enable_prefix_caching is 'no'; give True or False"]),
        ({"devices": None}, ["devices is None; give a text"]),
        ({"devices": 0}, ["devices is 0; give a text"]),
        ({"draft_model": Path("draft")}, ["draft_model is", "Path('draft')", "give a text"]),
        ({"quantization_encoding": 32}, ["quantization_encoding is 32; give a text"]),
        ({"weight_path": "a.gguf"}, ["weight_path is 'a.gguf'; give a tuple of Paths"]),
        ({"weight_path": ("a.gguf",)}, ["weight_path is ('a.gguf',); give a tuple of Paths"]),
        ({"speculative_method": ["eagle"]}, ["['eagle'] is unknown", "dflash, eagle"]),
        (
            {"use_relaxed_acceptance_for_thinking": True, "relaxed_delta": "half"},
            ["relaxed_delta is 'half'; give a number"],
        ),
        (
            {"use_relaxed_acceptance_for_thinking": True, "thinking_tokens": 5},
            ["thinking_tokens is 5", "two different tokens"],
        ),
    ],
)
def test_engine_configuration(changes: dict[str, Any], words: list[str]) -> None:
    fields: dict[str, Any] = {"draft_model": "draft", "speculative_method": "eagle", **changes}
    with pytest.raises(InputError) as refused:
        EngineConfig(model="target", **fields)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"devices": "tpu"}, ["devices 'tpu'", "use 'cpu'"]),
        ({"devices": "cpu:1"}, ["devices 'cpu:1'", "use 'cpu'"]),
        ({"quantization_encoding": "q4_k"}, ["'q4_k'", "use 'float32'"]),
        ({"weight_path": (Path("/nowhere/w.gguf"),)}, ["/nowhere/w.gguf", "correct the path"]),
    ],
)
def test_pipeline_configuration(pair: TinyPair, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        EngineConfig(model=str(pair.target), **changes).pipeline_config()
    for word in words:
        assert word in str(refused.value)


def test_what_only_max_knows_to_be_wrong(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing known gets there; its own words then stand in a sentence with a fix."""

    def refuse(options: PipelineArgs) -> None:
        PipelineArgs(model_path="x", max_length="far\n")  # type: ignore[arg-type]

    monkeypatch.setattr(PipelineConfig, "from_args", refuse)
    with pytest.raises(InputError) as refused:
        EngineConfig(model=str(pair.target)).pipeline_config()
    expected = f"{pair.target} cannot run with max_length 'far\\n', which MAX refuses ("
    assert str(refused.value).startswith(expected)
    assert str(refused.value).endswith(
        "; leave the option out, or use the checkpoint's own config.json"
    )


def test_thinking_tokens_that_the_tokenizer_lacks(pair: TinyPair) -> None:
    config = EngineConfig(
        model=str(pair.target),
        draft_model=str(pair.draft),
        speculative_method="eagle",
        use_relaxed_acceptance_for_thinking=True,
        thinking_tokens=("<s>", "[/THINK]"),
    )
    with pytest.raises(InputError, match=r"'\[/THINK\]' is not in the tokenizer.*give the tokens"):
        Engine(config)


@pytest.mark.parametrize(
    ("request_fields", "words"),
    [
        ({"token_ids": []}, ["prompt 2 is empty", "give"]),
        ({"token_ids": [5, 256]}, ["prompt 2", "token id 256", "vocabulary of 256", "use"]),
        ({"token_ids": [-1, 5]}, ["prompt 2", "token id -1", "vocabulary of 256", "use"]),
        ({"logit_bias": {300: 1.0}}, ["prompt 2", "token id 300", "vocabulary of 256", "use"]),
        ({"token_ids": [5] * 512}, ["prompt 2 has 512 tokens", "max_length is 512", "shorten"]),
        (
            {"sampling": SamplingParams(max_new_tokens=0)},
            ["max_new_tokens is 0", "choose at least 1"],
        ),
    ],
)
def test_requests(pair: TinyPair, request_fields: dict[str, Any], words: list[str]) -> None:
    engine = Engine(EngineConfig(model=str(pair.target)))
    fields: dict[str, Any] = {"token_ids": [5], "sampling": SamplingParams(max_new_tokens=4)}
    requests = [Request(**fields), Request(**{**fields, **request_fields})]
    with pytest.raises(InputError) as refused:
        engine.generate(requests)
    for word in words:
        assert word in str(refused.value)
