"""Llama and its relatives on the ModuleV3 API: logits, hidden states and log probabilities.

The references are the models of transformers. A graph takes minutes to compile, so three of
them share all features.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from max.driver import Buffer
from max.nn.transformer import ReturnHiddenStates, ReturnLogits
from modulev3 import MAX_LENGTH, Driver, pipeline_config
from prompts import random_prompt
from reference.target import TargetReference
from safetensors.torch import load_file, save_file
from tiny import tiny_causal_lm
from transformers import (
    AutoTokenizer,
    GraniteConfig,
    LlamaConfig,
    OlmoConfig,
    Phi3Config,
    PretrainedConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from unispec.errors import InputError
from unispec.pipelines.architectures.llama3_modulev3 import (
    Llama3Config,
    Llama3Inputs,
    Llama3Model,
)
from unispec.pipelines.layers.rope import (
    LongRotaryEmbedding,
    read_rope,
)
from unispec.pipelines.targets.llama.stack import llama_rope

TOLERANCE = 1e-4
"""Largest error, relative to the largest value of the reference."""

VOCAB = 256
LENGTHS = (5, 50, 17, 3)
PROMPTS = [random_prompt(VOCAB, length, seed=length) for length in LENGTHS]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FIRST_CONTEXT = 24
"""Positions that the LongRoPE model knows without scaling; some prompts are longer."""

Array = npt.NDArray[Any]


def granite(**changes: Any) -> GraniteConfig:
    constants = {
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "logits_scaling": 5.0,
    }
    return GraniteConfig(**SHAPE, **constants | changes)


def phi3(**changes: Any) -> Phi3Config:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
        "long_factor": [2.0 + 3.0 * pair for pair in range(8)],
    }
    return Phi3Config(
        **SHAPE, original_max_position_embeddings=FIRST_CONTEXT, rope_parameters=rope | changes
    )


def olmo() -> OlmoConfig:
    """As a Llama may be, too: wavelengths on both sides of llama3's bounds, heads wider than
    hidden size / heads, biases, a tied head."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return OlmoConfig(
        **SHAPE,
        clip_qkv=0.7,
        head_dim=32,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=rope,
    )


def reference(model: Any, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [T, V] and hidden states before and after the final norm [T, H]."""
    seen: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        output = model(torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False)
    hook.remove()
    return output.logits[0], seen[0], output.hidden_states[-1][0]


def assert_close(ours: Buffer | Array | None, theirs: Sequence[torch.Tensor]) -> None:
    """Asserts that ours are the reference's rows, one prompt's after the other's."""
    assert ours is not None
    found = np.asarray(ours.to_numpy() if isinstance(ours, Buffer) else ours)
    expected = torch.cat(list(theirs)).numpy()
    assert found.shape == expected.shape
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE, f"relative error {error:.1e}"


def last(rows: torch.Tensor) -> torch.Tensor:
    return rows[-1:]


# Features of a graph: each model has its own class of norms, ropes and constants


class LayerNormModel(Llama3Model):
    norm_method = "layer_norm"


@pytest.fixture(scope="module")
def olmo_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Driver]:
    """Layer norms without weights, clipped projections, llama3 rope, biases, a tied head, grouped
    queries; logits and features of all tokens."""
    folder = tmp_path_factory.mktemp("olmo")
    model = tiny_causal_lm(folder, olmo())
    driver = Driver(
        folder,
        LayerNormModel,
        return_logits=ReturnLogits.ALL,
        return_hidden_states=ReturnHiddenStates.ALL,
    )
    return model, driver


def test_all_logits_and_states_of_an_olmo(olmo_model: tuple[Any, Driver]) -> None:
    model, driver = olmo_model
    driver.begin(PROMPTS)
    inputs, outputs = driver.step()
    logits, states, _ = zip(*(reference(model, ids) for ids in PROMPTS), strict=True)
    assert_close(outputs.logits, logits)
    assert_close(outputs.next_token_logits, [last(rows) for rows in logits])
    assert_close(outputs.hidden_states, states)
    assert outputs.logit_offsets is not None
    assert outputs.logit_offsets.to_numpy().tolist() == [0, *itertools.accumulate(LENGTHS)]
    assert inputs.input_row_offsets.to_numpy().tolist() == [0, *itertools.accumulate(LENGTHS)]


def test_steps_after_the_first_read_the_cache(olmo_model: tuple[Any, Driver]) -> None:
    model, driver = olmo_model
    texts = [list(ids) for ids in PROMPTS]
    driver.begin(texts)
    driver.step()
    for step in range(3):
        tokens = [100 + 10 * step + row for row in range(len(texts))]
        driver.append(tokens)
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        _, outputs = driver.step()
        assert_close(outputs.next_token_logits, [last(reference(model, ids)[0]) for ids in texts])


def test_log_probabilities(olmo_model: tuple[Any, Driver]) -> None:
    """Of the drawn token in every row, of the prompt in a row with echo, of the best 3."""
    model, driver = olmo_model
    prompts, drawn = PROMPTS[:3], [9, 8, 7]
    driver.begin(prompts)
    inputs, outputs = driver.step()
    sampled = Buffer.from_numpy(np.array(drawn, np.int64))
    results = driver.model.compute_log_probabilities(
        driver.session, inputs, outputs, sampled, [3, 1, 0], [True, False, False]
    )
    assert results[2] is None  # none were asked for
    for ids, token, echo, top, result in zip(
        prompts[:2], drawn[:2], (True, False), (3, 1), results[:2], strict=True
    ):
        expected = torch.log_softmax(reference(model, ids)[0], dim=-1)  # [T, V]
        following = [*ids[1:], token]
        first = 0 if echo else len(ids) - 1
        assert result is not None
        assert result.token_log_probabilities == pytest.approx(
            [float(expected[row, following[row]]) for row in range(first, len(ids))], abs=1e-3
        )
        best = torch.topk(expected[-1], top)
        found = result.top_log_probabilities[-1]
        assert set(best.indices.tolist()) | {token} == set(found)
        for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            assert found[index] == pytest.approx(value, abs=1e-3)


class InterleavedConfig(Llama3Config):
    """Says that the rows of q and k that rotate together are neighbours."""

    @classmethod
    def initialize(cls, *arguments: Any, **options: Any) -> Any:
        config = super().initialize(*arguments, **options)
        return replace(config, interleaved_rope_weights=True)


class InterleavedLayerNormModel(LayerNormModel):
    config_class = InterleavedConfig


def interleave(folder: Path, head_dim: int) -> None:
    """Brings the rows of q and k into the order in which rows i and i + 1 rotate together."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    order = [row for pair in range(head_dim // 2) for row in (pair, pair + head_dim // 2)]
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            heads = tensor.reshape(-1, head_dim, *tensor.shape[1:])
            tensors[name] = heads[:, order].reshape(tensor.shape).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def granite_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Driver]:
    """Multipliers, interleaved weights, affine layer norms; a variable number of logits."""
    folder = tmp_path_factory.mktemp("granite")
    model = tiny_causal_lm(folder, granite(), layer_norm=True)
    interleave(folder, head_dim=16)
    driver = Driver(
        folder,
        InterleavedLayerNormModel,
        return_logits=ReturnLogits.VARIABLE,
        return_hidden_states=ReturnHiddenStates.LAST,
    )
    return model, driver


@pytest.mark.parametrize("count", [1, 3])
def test_variable_logits_and_last_states_of_a_granite(
    granite_model: tuple[Any, Driver], count: int
) -> None:
    model, driver = granite_model
    driver.begin(PROMPTS)
    _, outputs = driver.step(return_n_logits=count)
    logits, states, _ = zip(*(reference(model, ids) for ids in PROMPTS), strict=True)
    assert_close(outputs.logits, [rows[-count:] for rows in logits])
    assert_close(outputs.next_token_logits, [last(rows) for rows in logits])
    assert_close(outputs.hidden_states, [last(rows) for rows in states])
    assert outputs.logit_offsets is not None
    assert outputs.logit_offsets.to_numpy().tolist() == [0, count, 2 * count, 3 * count, 4 * count]


def test_more_logits_than_a_row_has_tokens(granite_model: tuple[Any, Driver]) -> None:
    _, driver = granite_model
    driver.begin(PROMPTS)
    with pytest.raises(InputError, match="return_n_logits is 4, but the shortest row has 3"):
        driver.step(return_n_logits=4)


@pytest.fixture(scope="module")
def phi3_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Driver]:
    """LongRoPE, joined projections; the last token's logits, normalised states of all tokens."""
    folder = tmp_path_factory.mktemp("phi3")
    model = tiny_causal_lm(folder, phi3())
    return model, Driver(folder, return_hidden_states=ReturnHiddenStates.ALL_NORMALIZED)


def test_a_phi3_beyond_its_first_context(phi3_model: tuple[Any, Driver]) -> None:
    """In two parts, so that keys of the first one are read from the cache."""
    model, driver = phi3_model
    texts = [random_prompt(VOCAB, length, seed=9) for length in (FIRST_CONTEXT, 60, 35)]
    driver.begin(texts)
    _, outputs = driver.step()
    logits, _, normalized = zip(*(reference(model, ids) for ids in texts[1:]), strict=True)
    assert_close(outputs.next_token_logits.to_numpy()[1:], [last(rows) for rows in logits])
    assert outputs.hidden_states is not None
    assert_close(outputs.hidden_states.to_numpy()[FIRST_CONTEXT:], normalized)
    driver.append([30, 31, 32])
    _, outputs = driver.step()
    texts = [[*ids, 30 + row] for row, ids in enumerate(texts)]
    logits, _, normalized = zip(*(reference(model, ids) for ids in texts), strict=True)
    assert_close(outputs.next_token_logits, [last(rows) for rows in logits])
    assert_close(outputs.hidden_states, [last(rows) for rows in normalized])
    assert outputs.logit_offsets is None


# What a configuration says


def read(folder: Path, config: PretrainedConfig, max_seq_len: int = MAX_LENGTH) -> Llama3Config:
    """Of a checkpoint whose weights play no part."""
    tiny_causal_lm(folder, config)
    return Llama3Config.initialize(pipeline_config(folder), max_seq_len=max_seq_len)


@pytest.mark.parametrize("max_seq_len", [FIRST_CONTEXT, FIRST_CONTEXT + 1])
@pytest.mark.parametrize("extension", [{}, {"factor": 4.0}])
def test_longrope_frequencies(
    tmp_path: Path, max_seq_len: int, extension: dict[str, float]
) -> None:
    """The longest sequence chooses the divisors: HF's for a sequence of that length."""
    hf = phi3(**extension)
    rope = llama_rope(read(tmp_path, hf, max_seq_len))
    assert isinstance(rope, LongRotaryEmbedding)
    expected, magnitude = ROPE_INIT_FUNCTIONS["longrope"](hf, seq_len=max_seq_len)
    np.testing.assert_allclose(rope.frequencies(), expected.numpy(), rtol=1e-6)
    assert rope.magnitude() == pytest.approx(magnitude, rel=1e-6)
    assert magnitude > 1.1


def test_constants_of_a_granite(tmp_path: Path) -> None:
    config = read(tmp_path, granite())
    assert config.attention_multiplier == 0.4
    assert config.embedding_multiplier == 3.0
    assert config.residual_multiplier == 0.3
    assert config.logits_scaling == 5.0


REFUSED: dict[str, tuple[Callable[[], PretrainedConfig], list[str]]] = {
    "logits_scaling": (lambda: granite(logits_scaling=-2.0), ["logits_scaling -2.0", "correct"]),
    "attention": (lambda: granite(attention_multiplier=0.0), ["attention_multiplier 0.0"]),
    "divisor": (lambda: phi3(long_factor=[-1.0] * 8), ["long_factor -1.0", "correct"]),
    "attention factor": (lambda: phi3(attention_factor=1.5), ["attention_factor 1.5", "remove"]),
    "part of a head": (
        lambda: LlamaConfig(**SHAPE, rope_parameters={"partial_rotary_factor": 0.5}),
        ["partial_rotary_factor 0.5", "whole heads"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_constants_are_refused(tmp_path: Path, name: str) -> None:
    config, words = REFUSED[name]
    with pytest.raises(InputError) as refusal:
        read(tmp_path, config())
    for word in (str(tmp_path), *words):
        assert word in str(refusal.value)


def test_divisors_for_another_width_of_head_are_refused() -> None:
    with pytest.raises(InputError, match="short_factor of here is no list of 16 numbers"):
        read_rope(phi3(), 32, "here", types=Llama3Config.ROPE_TYPES)


def test_bad_choices_are_refused(tmp_path: Path) -> None:
    config = read(tmp_path, olmo())
    with pytest.raises(InputError, match="norm_method 'batch_norm' is unknown; known: rms_norm"):
        replace(config, norm_method="batch_norm")
    with pytest.raises(InputError, match="'selected_layers' is not supported; supported: none"):
        replace(config, return_hidden_states=ReturnHiddenStates.SELECTED_LAYERS)
    with pytest.raises(InputError, match="rms_norm_eps is not set"):
        _ = replace(config, rms_norm_eps=None).norm_eps
    long = read(tmp_path / "long", phi3()).longrope_scaling_params
    with pytest.raises(InputError, match="are both set"):
        replace(config, longrope_scaling_params=long)


def test_a_window_that_sequences_outgrow_is_refused(tmp_path: Path) -> None:
    config = phi3()
    config.sliding_window = MAX_LENGTH - 1
    tiny_causal_lm(tmp_path, config)
    with pytest.raises(InputError, match=f"sliding_window {MAX_LENGTH - 1} .* at most"):
        Driver(tmp_path)


@pytest.mark.parametrize("name", ["lora_ids", "lora_ranks", "hidden_states"])
def test_inputs_that_no_graph_takes_are_refused(name: str) -> None:
    one = Buffer.from_numpy(np.zeros(1, np.int64))
    inputs = Llama3Inputs(one, one, one)
    with pytest.raises(InputError, match="kv_cache_inputs is not set"):
        _ = inputs.buffers
    setattr(inputs, name, one)
    with pytest.raises(InputError, match=f"{name} is set, but the compiled graph does not take"):
        _ = inputs.buffers


# MAX's own pipeline

PROMPT = "Name three rivers in Europe."
ANSWER = 24
STEPPED = "unispec's model puts out"
WATCHED = f"""
import runpy, sys
from unispec.pipelines.architectures.llama3_modulev3 import Llama3Model
execute = Llama3Model.execute
def execute_and_say(self, model_inputs):
    outputs = execute(self, model_inputs)
    print({STEPPED!r}, outputs.hidden_states, file=sys.stderr)
    return outputs
Llama3Model.execute = execute_and_say
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script, and says which hidden states the model puts out."""


@pytest.mark.compiles("SmolLM2 alone")
def test_max_generate_writes_what_the_target_does(demo_model: Path) -> None:
    """Greedily, through the command line that a user has."""
    options = {
        "--model": str(demo_model),
        "--custom-architectures": "unispec.pipelines.architectures",
        "--devices": "cpu",
        "--quantization-encoding": "float32",
        "--max-length": "256",
        "--prompt": PROMPT,
        "--max-new-tokens": str(ANSWER),
        "--temperature": "0",
    }
    max_command = Path(sys.executable).parent / "max"
    arguments = [text for option in options.items() for text in option]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, max_command, "generate", "--prefer-module-v3", *arguments],
        # Importing MAX changes what a child inherits where it is not given.
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # MAX has a model for such a checkpoint too; by default ours puts out no hidden states.
    assert f"{STEPPED} None" in done.stderr
    target = TargetReference(demo_model)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
    )
    trace = target.greedy(ids, ANSWER, eos=[2])
    assert tokenizer.decode(trace.token_ids, skip_special_tokens=True) in done.stdout
