"""Configuration files that cannot be used, and parts that do not fit each other, are refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping

import pytest
from damages import SOUND, Damage, check, config, content, removed
from tiny import TinyPair

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
        config("target", model_type="gemma2", architectures=["Gemma2ForCausalLM"]),
        ["gemma2 with eagle", "supported: deepseek_v3 with mtp", "llama with eagle"],
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


@pytest.mark.parametrize(
    ("damage", "words"),
    CONFIG_CASES.values(),
    ids=[name.replace(" ", "-") for name in CONFIG_CASES],
)
def test_configuration_files(pair: TinyPair, damage: Damage, words: list[str]) -> None:
    check(pair, damage, [], words)


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
