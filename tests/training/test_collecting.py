"""Collecting a target's answers: they are its own, with its features, whatever is killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from prompts import random_prompt
from reference.target import TargetReference
from safetensors.torch import load_file, save_file
from small_training import METHODS, PROMPTS, SETTINGS, SHAPES, features, untrained
from tiny import TinyPair
from torch import Tensor
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from unispec.errors import InputError
from unispec.methods import Method
from unispec.training import Collection, CollectSettings, TorchTarget, collect
from unispec.training.answering import draw
from unispec.training.attention import GROUPED
from unispec.training.prompts import built_in_prompts
from unispec.training.settings import Dtype

pytestmark = pytest.mark.usefixtures("one_thread")


@METHODS
def test_features_are_the_targets(
    target: TorchTarget,
    collected: Callable[[Method], Collection],
    tiny_target: Callable[[str], TargetReference],
    method: Method,
) -> None:
    """Of what was stored, against hidden states that transformers gives for the same tokens."""
    collection, reference = collected(method), tiny_target("llama_eagle_agreeing")
    layers = SHAPES[method].tapped_layers(target.config)
    for place in [*collection.training[:3], *collection.held_out[:2]]:
        one = collection.read(place)
        expected = features(reference, one.tokens.tolist(), layers)
        torch.testing.assert_close(one.features[:-1], expected[:-1], rtol=2e-3, atol=2e-3)
        assert not one.features[-1].any()


def test_held_out_answers_are_greedy_and_to_prompts_of_their_own(
    target: TorchTarget,
    collected: Callable[[Method], Collection],
    tiny_target: Callable[[str], TargetReference],
) -> None:
    collection = collected("eagle")

    def prompts(places: Sequence[Any]) -> set[tuple[int, ...]]:
        read = map(collection.read, places)
        return {tuple(one.tokens[: one.prompt_length].tolist()) for one in read}

    assert len(collection.held_out) == -(-len(PROMPTS) // 10)
    assert not prompts(collection.held_out) & prompts(collection.training)
    for place in collection.held_out:
        one = collection.read(place)
        ids = one.tokens.tolist()
        trace = tiny_target("llama_eagle_agreeing").greedy(ids[: one.prompt_length], 48, target.eos)
        assert trace.token_ids == ids[one.prompt_length :]


@pytest.mark.parametrize("groups", [1, 3, 9])
@pytest.mark.parametrize("tokens", [1, 4])
def test_grouped_attention_is_attention(groups: int, tokens: int) -> None:
    """Against transformers' eager one, behind padding of any length."""
    rows, heads, width, length = 5, 9, 8, 12
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, heads, tokens, width, generator=generator)
    key, value = torch.randn(2, rows, groups, length, width, generator=generator)
    places = torch.arange(length)
    behind_padding = places >= torch.tensor([0, 3, 7, 1, 5])[:, None]  # [S, L]
    causal = places <= torch.arange(length - tokens, length)[:, None]  # [T, L]
    seen = behind_padding[:, None, None] & causal  # [S, 1, T, L]
    module = torch.nn.Module()
    module.num_key_value_groups = heads // groups
    module.is_causal = True
    inputs = (module, query, key, value)
    ours, _ = AttentionInterface()[GROUPED](*inputs, seen, scaling=0.3)
    added = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    theirs, _ = eager_attention_forward(*inputs, added, scaling=0.3)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_each_answer_has_its_temperature(
    target: TorchTarget, tiny_target: Callable[[str], TargetReference]
) -> None:
    ids = random_prompt(256, 12, seed=1)
    shorter = ids[3:]

    def answers(seed: int) -> list[list[int]]:
        prompts, temperatures = [ids, ids, ids, shorter, ids], [0, 1.0, 0, 0, 1.0]
        answered = target.answers(prompts, temperatures, (), 24, seed)
        return [one.tokens[one.prompt_length :] for one in answered]

    greedy, warm, same, short, other = answers(seed=1)
    assert (
        greedy == same == tiny_target("llama_eagle_agreeing").greedy(ids, 24, target.eos).token_ids
    )
    assert short == tiny_target("llama_eagle_agreeing").greedy(shorter, 24, target.eos).token_ids
    assert warm != other
    assert answers(seed=1) == [greedy, warm, same, short, other]
    assert answers(seed=2)[1] != warm


@pytest.fixture
def ending(tiny_pair: Callable[[str], TinyPair]) -> TorchTarget:
    """Its answers end at many tokens, so at many lengths."""
    target = TorchTarget(str(tiny_pair("llama_eagle_agreeing").target))
    target.eos = list(range(0, 256, 16))
    return target


@pytest.mark.parametrize("layers", [(), (0,), (0, 1)])
def test_an_answer_that_ends_leaves_the_others_as_they_are(
    ending: TorchTarget, tiny_target: Callable[[str], TargetReference], layers: tuple[int, ...]
) -> None:
    prompts = [random_prompt(256, 3 + 2 * number, seed=number) for number in range(16)]
    answered = ending.answers(prompts, [0.0] * len(prompts), layers, 40, seed=0)
    assert len({len(one.tokens) - one.prompt_length for one in answered}) > 4
    for prompt, one in zip(prompts, answered, strict=True):
        expected = tiny_target("llama_eagle_agreeing").greedy(prompt, 40, ending.eos).token_ids
        assert one.tokens == [*prompt, *expected]
        assert one.prompt_length == len(prompt)
        output = ending.model(torch.tensor([one.tokens]), output_hidden_states=True)
        last = output.hidden_states[-1]
        taps = [unnormed(ending, one.tokens, layer) for layer in layers]
        truth = torch.cat(taps, dim=-1) if taps else last[0]
        torch.testing.assert_close(one.features[:-1].float(), truth[:-1], rtol=2e-3, atol=2e-3)
        assert not one.features[-1].any()


def unnormed(target: TorchTarget, ids: list[int], layer: int) -> Tensor:
    """What a decoder layer puts out, by a model that ends with it."""
    model = target.model.get_decoder()
    shorter = type(model)(model.config).eval()
    shorter.load_state_dict(model.state_dict())
    shorter.layers = shorter.layers[: layer + 1]
    shorter.norm = torch.nn.Identity()
    with torch.inference_mode():
        return shorter(torch.tensor([ids])).last_hidden_state[0]  # type: ignore[no-any-return]


def test_sampled_answers_are_the_same_however_others_end(ending: TorchTarget) -> None:
    prompts = [random_prompt(256, 3 + 2 * number, seed=number) for number in range(16)]
    temperatures = [(0.0, 0.7, 1.0, 1.5)[number % 4] for number in range(16)]
    ends = set(ending.eos)
    cut = ending.answers(prompts, temperatures, (), 30, seed=3)
    ending.eos = []
    for short, whole in zip(
        cut, ending.answers(prompts, temperatures, (), 30, seed=3), strict=True
    ):
        written = whole.tokens[whole.prompt_length :]
        assert len(written) == 30
        end = next((i + 1 for i, token in enumerate(written) if token in ends), 30)
        assert short.tokens == whole.tokens[: whole.prompt_length + end]
    assert len({len(one.tokens) - one.prompt_length for one in cut}) > 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_beyond_float16_are_its_largest(
    tiny_pair: Callable[[str], TinyPair], dtype: Dtype
) -> None:
    """Massive activations exist; infinity would end the fit."""
    target = TorchTarget(str(tiny_pair("llama_eagle_agreeing").target), dtype=dtype)
    target.model.get_decoder().norm.weight.data *= 1e5
    (one,) = target.answers([random_prompt(256, 9, seed=0)], [0.0], (), 4, seed=0)
    assert one.features.isfinite().all()
    assert one.features.abs().max() == torch.finfo(torch.float16).max


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """At evenly spread draws the shares are the probabilities, but for the grid's spacing."""
    logits = torch.tensor([-200.0, 3.0, -1.0, 0.5, 2.0, -30.0])
    many = 100_000
    draws = (torch.arange(many) + 0.5) / many
    for temperature in (0.7, 1.0):
        drawn = draw(logits.expand(many, -1), torch.full((many,), temperature), draws)
        shares = torch.bincount(drawn, minlength=6) / many
        expected = (logits / temperature).softmax(dim=-1)
        assert (shares - expected).abs().max() < 3 / many
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert draw(logits.expand(2, -1), torch.ones(2), ends).tolist() == [1, 4]
    assert draw(logits.expand(2, -1), torch.zeros(2), ends).tolist() == [1, 1]
    with pytest.raises(ArithmeticError, match="NaN or infinite"):
        draw(logits.where(logits > 0, torch.nan)[None], torch.ones(1), ends[:1])


def test_a_killed_collection_goes_on(target: TorchTarget, tmp_path: Path) -> None:
    settings = CollectSettings(tokens=3500, **SETTINGS)

    def kill(collection: Collection) -> None:
        if collection.num_shards == 1:
            (collection.folder / "shard-00001.safetensors.part").write_bytes(b"half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(target, PROMPTS, settings, tmp_path / "killed", on_shard=kill)
    resumed = collect(target, PROMPTS, settings, tmp_path / "killed")
    whole = collect(target, PROMPTS, settings, tmp_path / "whole")
    assert resumed.num_shards == whole.num_shards >= 2
    for number in range(whole.num_shards):
        name = f"shard-{number:05d}.safetensors"
        ours, theirs = (load_file(tmp_path / run / name) for run in ("killed", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_target_in_bfloat16(tiny_pair: Callable[[str], TinyPair]) -> None:
    """What it keeps while it answers is what one pass over the whole gives, but for rounding."""
    prompts = [random_prompt(256, length, seed=length) for length in (5, 30)]
    rough = TorchTarget(str(tiny_pair("llama_eagle_agreeing").target), dtype="bfloat16")
    for one in rough.answers(prompts, [0, 0.7], (), 20, seed=0):
        with torch.inference_mode():
            whole = rough.model.get_decoder()(torch.tensor([one.tokens])).last_hidden_state[0]
        assert whole.dtype == torch.bfloat16
        error = (one.features[:-1] - whole[:-1]).float().norm() / whole.float().norm()
        assert 0 < error < 0.02


def test_a_target_that_is_no_llama(tiny_pair: Callable[[str], TinyPair]) -> None:
    with pytest.raises(InputError, match="DeepseekV3ForCausalLM: choose a Llama"):
        TorchTarget(str(tiny_pair("deepseek_mtp_agreeing").target))


@pytest.fixture
def mistral(tiny_pair: Callable[[str], TinyPair], tmp_path: Path) -> TorchTarget:
    """The target of `llama_eagle_agreeing` by another name, with a window of 32 tokens."""
    file = (
        Path(shutil.copytree(tiny_pair("llama_eagle_agreeing").target, tmp_path / "mistral"))
        / "config.json"
    )
    fields = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | fields | {"sliding_window": 32}))
    return TorchTarget(str(file.parent))


@METHODS
def test_a_mistral_answers_as_the_llama_that_it_is(
    target: TorchTarget,
    mistral: TorchTarget,
    collected: Callable[[Method], Collection],
    method: Method,
) -> None:
    """Up to its window; its draft is a Llama's."""
    prompts = [random_prompt(256, length, seed=length) for length in (1, 9, 24)]
    layers = SHAPES[method].tapped_layers(target.config)
    options: dict[str, Any] = {"layers": layers, "max_new_tokens": 8}
    ours, theirs = (
        one.answers(prompts, [0.0, 0.0, 1.0], seed=1, **options) for one in (mistral, target)
    )
    for own, other in zip(ours, theirs, strict=True):
        assert own.tokens == other.tokens
        torch.testing.assert_close(own.features, other.features)
    draft = untrained(mistral, collected(method), method).config()
    assert draft["model_type"] == "llama"
    assert draft.get("sliding_window") is None


def test_texts_that_outgrow_a_mistrals_window(mistral: TorchTarget) -> None:
    with pytest.raises(
        InputError, match=r"has 24 tokens.* up to 9, .* sliding_window 32 of .*: shorten"
    ):
        mistral.write([[5] * 3, [5] * 24], [0.0, 0.0], 9, [2], 0)


def test_texts_that_fill_the_models_positions(target: TorchTarget, tmp_path: Path) -> None:
    """512 of them: up to there it answers, beyond it is refused before a folder is made."""
    (answered,) = target.answers([[5] * 504], [0.0], (), 8, seed=0)
    assert len(answered.tokens) > 504
    with pytest.raises(InputError, match=r"505 tokens.* up to 8, .* max_position_embeddings 512"):
        target.answers([[5] * 505, [5]], [0.0, 0.0], (), 8, seed=0)
    longest = len(target.tokenizer.encode(text := "ab" * 300))
    settings = CollectSettings(tokens=1, max_new_tokens=8, chat_template=False)
    with pytest.raises(InputError, match=rf"longest prompt has {longest} tokens.*: shorten"):
        collect(target, [*PROMPTS, text], settings, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_layer_that_the_target_does_not_have(target: TorchTarget, tmp_path: Path) -> None:
    settings = CollectSettings(layers=(0, 3), tokens=1, **SETTINGS)
    with pytest.raises(InputError, match=r"layers\[1\] is 3: choose .* at least 0 and at most 2$"):
        collect(target, PROMPTS, settings, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_what_the_checkpoint_says_of_generation_changes_no_greedy_answer(
    tiny_pair: Callable[[str], TinyPair], target: TorchTarget, tmp_path: Path
) -> None:
    """Penalties of generation_config.json are for users; a draft is to foresee the target."""
    folder = tmp_path / "target"
    shutil.copytree(tiny_pair("llama_eagle_agreeing").target, folder)
    changes = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2, "eos_token_id": [2, 7]}
    (folder / "generation_config.json").write_text(json.dumps(changes))
    other = TorchTarget(str(folder))
    assert other.eos == [2, 7]
    other.eos = target.eos
    ids = [random_prompt(256, length, seed=length) for length in (5, 30)]
    theirs, ours = (one.answers(ids, [0, 0], (), 40, seed=0) for one in (target, other))
    assert [one.tokens for one in ours] == [one.tokens for one in theirs]


def test_a_target_that_computes_nan(tiny_pair: Callable[[str], TinyPair], tmp_path: Path) -> None:
    folder = tmp_path / "target"
    shutil.copytree(tiny_pair("llama_eagle_agreeing").target, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = CollectSettings(tokens=10, **SETTINGS)
    with pytest.raises(InputError, match="target computes NaN: use a sound checkpoint"):
        collect(TorchTarget(str(folder)), PROMPTS, settings, tmp_path / "data")


def test_a_target_that_lacks_a_tensor(tiny_pair: Callable[[str], TinyPair], tmp_path: Path) -> None:
    folder = tmp_path / "target"
    shutil.copytree(tiny_pair("llama_eagle_agreeing").target, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        TorchTarget(str(folder))


def test_the_built_in_prompts_are_many_and_differ() -> None:
    prompts = built_in_prompts()
    assert len(set(prompts)) == len(prompts) > 9000
    assert prompts == built_in_prompts()
    assert not [text for text in prompts if "{}" in text]
