"""The DFlash reference, and the tiny DFlash checkpoints, that other tests rest on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prompts import random_prompt, real_prompts
from reference.dflash import DFlashReference
from reference.eagle import acceptance_per_position, mean_acceptance_length
from reference.target import TargetReference, assert_same_greedy
from safetensors.torch import load_file, save_file
from tiny import PRESETS, agreeing_dflash, agreeing_llama, tiny_dflash
from tiny.checkpoint import Array, read
from torch import Tensor
from transformers import AutoTokenizer

from unispec.checkpoints.demo import demo_draft_folder

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": (
        "llama_eagle",
        {
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "block_size": 6,
            "target_layer_ids": (0, 1),
            "mask_token_id": 5,
        },
    ),
    "wide": (
        "llama_eagle_biased",
        {
            "layers": 1,
            "heads": 2,
            "kv_heads": 1,
            "head_dim": 32,
            "block_size": 4,
            "target_layer_ids": (2, 0),
            "mask_token_id": 319,
            "attention_bias": True,
        },
    ),
    "mixed": (
        "llama_eagle",
        {
            "layers": 3,
            "heads": 8,
            "kv_heads": 4,
            "head_dim": 16,
            "block_size": 5,
            "target_layer_ids": (1,),
            "mask_token_id": 2,
            "sliding_window": 4,
            "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
        },
    ),
    "narrow": (
        "llama_eagle_bfloat16",
        {
            "layers": 1,
            "heads": 4,
            "kv_heads": 4,
            "head_dim": 16,
            "block_size": 6,
            "target_layer_ids": (0, 1),
            "mask_token_id": 0,
            "d2t": 128,
            "sliding_window": 3,
            "layer_types": ("sliding_attention",),
        },
    ),
    "both ways": (
        "llama_eagle",
        {
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "block_size": 4,
            "target_layer_ids": (0, 1),
            "mask_token_id": 5,
            "sliding_window": 5,
            "layer_types": ("sliding_attention", "full_attention"),
            "sliding_window_non_causal": True,
        },
    ),
    "causal": (
        "llama_eagle",
        {
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "block_size": 6,
            "target_layer_ids": (0, 1),
            "mask_token_id": 5,
            "is_causal": True,
        },
    ),
    "one layer both ways": (
        "llama_eagle_bfloat16",
        {
            "layers": 1,
            "heads": 4,
            "kv_heads": 4,
            "head_dim": 16,
            "block_size": 6,
            "target_layer_ids": (0, 1),
            "mask_token_id": 0,
            "sliding_window": 6,
            "layer_types": ("sliding_attention",),
            "is_causal": False,
        },
    ),
}
"""By name: a preset's target, and the shape of a draft for it."""


@dataclass(frozen=True)
class Loaded:
    """A draft's folder, and the references that read it and its target."""

    folder: Path
    draft: DFlashReference

    @property
    def target(self) -> TargetReference:
        """The draft's target."""
        return self.draft.target

    def prompt(self, length: int, seed: int) -> list[int]:
        """A random prompt without special tokens."""
        return random_prompt(len(self.target.embedding), length, seed)

    def context(self, ids: list[int]) -> Tensor:
        """The draft's context rows of ``ids`` [T, H]."""
        return self.draft.context(self.draft.taps(ids))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices lose time when they are shared among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    """Builds and loads a draft of ``SHAPES`` and its target by name, once each."""
    targets: dict[str, Path] = {}
    loaded: dict[str, Loaded] = {}

    def build(name: str) -> Loaded:
        if name not in loaded:
            preset, shape = SHAPES[name]
            if preset not in targets:
                targets[preset] = PRESETS[preset](tmp_path_factory.mktemp(preset)).target
            folder = tiny_dflash(tmp_path_factory.mktemp(name), targets[preset], **shape, seed=21)
            loaded[name] = Loaded(folder, DFlashReference(folder, TargetReference(targets[preset])))
        return loaded[name]

    return build


@pytest.fixture(params=SHAPES)
def loaded(request: pytest.FixtureRequest, load: Callable[[str], Loaded]) -> Loaded:
    """Each draft in turn."""
    return load(request.param)


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The pair that agrees on most tokens."""
    target = agreeing_llama(tmp_path_factory.mktemp("target"), seed=4)
    folder = agreeing_dflash(tmp_path_factory.mktemp("draft"), target, seed=14)
    return Loaded(folder, DFlashReference(folder, TargetReference(target)))


# The pass over a block


def naive_logits(loaded: Loaded, ids: list[int]) -> Array:
    """The logits [B - 1, N] after ``ids``: one slot, one head and one key at a time, float64."""
    config, tensors = read(loaded.folder)
    width, eps, biased = config["head_dim"], config["rms_norm_eps"], config["attention_bias"]
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    # The target's RoPE is the draft's, where their heads have the same width.
    theta = config["rope_parameters"]["rope_theta"]
    frequencies = theta ** (-2 * np.arange(width // 2) / width)
    if config["rope_parameters"]["rope_type"] != "default":
        frequencies = loaded.target.model.model.rotary_emb.inv_freq.double().numpy()
    embedding = loaded.target.embedding.double().numpy()
    head = loaded.target.head.double().numpy()

    def normed(row: Array, name: str) -> Array:
        scaled: Array = row / np.sqrt(np.mean(row**2) + eps) * tensors[f"{name}.weight"]
        return scaled

    def projected(row: Array, layer: str, name: str) -> Array:
        weight = f"{layer}.self_attn.{name}_proj.weight"
        result: Array = tensors[weight] @ row
        return result + tensors[weight.replace("weight", "bias")] if biased else result

    def head_of(row: Array, layer: str, name: str, index: int) -> Array:
        return projected(row, layer, name)[index * width : (index + 1) * width]

    def placed(row: Array, layer: str, name: str, index: int, position: int) -> Array:
        rows = normed(head_of(row, layer, name, index), f"{layer}.self_attn.{name}_norm")
        pairs = rows[: width // 2] + 1j * rows[width // 2 :]
        turned: Array = pairs * np.exp(1j * position * frequencies)
        return turned

    taps = loaded.draft.taps(ids[:-1]).double().numpy()
    context = [normed(tensors["fc.weight"] @ row, "hidden_norm") for row in taps]
    mask = config["dflash_config"]["mask_token_id"]
    stream = [embedding[token] for token in [ids[-1]] + [mask] * (config["block_size"] - 1)]
    for index in range(config["num_hidden_layers"]):
        layer = f"layers.{index}"
        sliding = config.get("layer_types", ["full_attention"] * 9)[index] == "sliding_attention"
        rows = context + [normed(row, f"{layer}.input_layernorm") for row in stream]
        after = []
        for slot, row in enumerate(stream):
            here = len(context) + slot
            window = config["sliding_window"] if sliding else 999
            both_ways = config.get("sliding_window_non_causal", not sliding)
            ends = here if config.get("is_causal", not both_ways) else here + window - 1
            seen = range(here - window + 1, ends + 1)
            places = [place for place in range(len(rows)) if place in seen]
            heads = []
            for q in range(config["num_attention_heads"]):
                query = placed(rows[here], layer, "q", q, here)
                keys = [placed(rows[place], layer, "k", q // group, place) for place in places]
                weights = np.exp([(query.conj() @ key).real / np.sqrt(width) for key in keys])
                values = [head_of(rows[place], layer, "v", q // group) for place in places]
                heads.append(weights @ np.array(values) / weights.sum())
            row = row + projected(np.concatenate(heads), layer, "o")
            inner = normed(row, f"{layer}.post_attention_layernorm")
            gate = tensors[f"{layer}.mlp.gate_proj.weight"] @ inner
            up = tensors[f"{layer}.mlp.up_proj.weight"] @ inner
            after.append(
                row + tensors[f"{layer}.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
            )
        stream = after
    if "d2t" in tensors:
        head = np.stack([head[i + offset] for i, offset in enumerate(tensors["d2t"])])
    return np.stack([head @ normed(row, "norm") for row in stream[1:]])


@pytest.mark.parametrize("length", [2, 12])
def test_logits_are_those_of_a_naive_loop(loaded: Loaded, length: int) -> None:
    ids = loaded.prompt(length, seed=1)
    ours = loaded.draft.logits(ids[-1], loaded.context(ids[:-1]))
    theirs = naive_logits(loaded, ids)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)
    proposals = loaded.draft.target_ids[theirs.argmax(axis=1)].tolist()
    for k in range(1, loaded.draft.block_size):
        assert loaded.draft.propose(ids, k) == proposals[:k]


def test_taps_are_the_outputs_of_the_targets_layers(loaded: Loaded) -> None:
    ids = loaded.prompt(17, seed=2)
    taps = loaded.draft.taps(ids).split(loaded.target.embedding.shape[1], dim=1)
    with torch.inference_mode():
        model = loaded.target.model.model
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer, tap in zip(loaded.draft.target_layer_ids, taps, strict=True):
            # The last of the states is after the final norm.
            last = layer == len(model.layers) - 1
            torch.testing.assert_close(model.norm(tap) if last else tap, states[layer + 1][0])


def test_without_branches_every_slot_predicts_what_the_mask_token_does(
    load: Callable[[str], Loaded], tmp_path: Path
) -> None:
    loaded = load("full")
    tensors = load_file(loaded.folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((loaded.folder / "config.json").read_text())
    draft = DFlashReference(tmp_path, loaded.target)
    scores = loaded.target.head @ (draft.embedding[5] * tensors["norm.weight"])  # [V]
    for step in draft.simulate(loaded.prompt(6, seed=3), 4, 5):
        assert step.proposals == [int(scores.argmax())] * 5


def changed_slots(before: Tensor, after: Tensor) -> list[bool]:
    """Which slots but the first have other logits, each [B - 1, N]."""
    return ((after - before).abs().amax(dim=1) > 1e-4).tolist()


@pytest.mark.parametrize(
    ("name", "window"), [("full", 999), ("narrow", 3), ("one layer both ways", 6), ("causal", 999)]
)
def test_each_slot_sees_the_context_rows_of_its_window(
    load: Callable[[str], Loaded], name: str, window: int
) -> None:
    loaded = load(name)
    ids = loaded.prompt(9, seed=4)
    context = loaded.context(ids[:-1])
    before = loaded.draft.logits(ids[-1], context)
    for row in range(len(context)):
        other = context.clone()
        other[row] += 1
        seen = [len(context) + slot - row < window for slot in range(1, loaded.draft.block_size)]
        assert changed_slots(before, loaded.draft.logits(ids[-1], other)) == seen


@pytest.mark.parametrize(("name", "window"), [("full", 999), ("narrow", 3)])
def test_each_slot_sees_the_next_token_within_its_window(
    load: Callable[[str], Loaded], name: str, window: int
) -> None:
    loaded = load(name)
    ids = loaded.prompt(9, seed=5)
    context = loaded.context(ids[:-1])
    before, after = (loaded.draft.logits(token, context) for token in (ids[-1], ids[0]))
    seen = [slot < window for slot in range(1, loaded.draft.block_size)]
    assert changed_slots(before, after) == seen


@pytest.mark.parametrize(
    ("name", "both_directions"),
    [("full", True), ("narrow", False), ("one layer both ways", True), ("causal", False)],
)
def test_a_full_layer_sees_later_slots_or_as_the_keys_say(
    load: Callable[[str], Loaded],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    both_directions: bool,
) -> None:
    loaded = load(name)
    ids = loaded.prompt(9, seed=6)
    context = loaded.context(ids[:-1])
    before = loaded.draft.logits(ids[-1], context)
    monkeypatch.setattr(loaded.draft, "block_size", 4)
    after = loaded.draft.logits(ids[-1], context)
    assert changed_slots(before[:3], after) == [both_directions] * 3


# Speculative decoding


def test_proposals_kept_context_and_anew_agree(loaded: Loaded) -> None:
    k = loaded.draft.block_size - 1
    for length in (1, 30):
        ids = loaded.prompt(length, seed=7)
        for step in loaded.draft.simulate(ids, 8, k):
            assert step.verified_length == len(ids)
            _, logits = loaded.target.features_and_logits(ids)
            assert step.next_token == int(logits[-1].argmax())
            ids.append(step.next_token)
            assert step.proposals == loaded.draft.propose(ids, k)
            ids += step.proposals[: step.num_accepted]


@pytest.mark.parametrize("k", [1, 5])
def test_simulated_text_is_the_targets_greedy_text(agreeing: Loaded, k: int) -> None:
    prompt = agreeing.prompt(8, seed=8)
    steps = agreeing.draft.simulate(prompt, 25, k)
    text = [
        token for step in steps for token in [step.next_token, *step.proposals[: step.num_accepted]]
    ]
    assert_same_greedy(text, agreeing.target.greedy(prompt, len(text)))


def test_simulation_ends_with_eos(agreeing: Loaded) -> None:
    prompt = agreeing.prompt(8, seed=9)
    text = agreeing.target.greedy(prompt, 40).token_ids
    eos = text[-1]
    end = len(prompt) + text.index(eos)
    steps = agreeing.draft.simulate(prompt, 40, 5, eos={eos})
    assert steps[-1].verified_length < end <= steps[-1].verified_length + 6


@pytest.mark.parametrize("k", [0, 6])
def test_proposals_must_fit_the_block(load: Callable[[str], Loaded], k: int) -> None:
    with pytest.raises(ValueError, match=f"a block of 6 slots has no {k} proposals"):
        load("full").draft.propose([3, 4, 5], k)


def test_a_draft_with_its_own_head_is_refused(
    load: Callable[[str], Loaded], tmp_path: Path
) -> None:
    loaded = load("full")
    tensors = load_file(loaded.folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((loaded.folder / "config.json").read_text())
    with pytest.raises(RuntimeError, match=r"lm_head\.weight"):
        DFlashReference(tmp_path, loaded.target)


# The checkpoints


def test_proposals_of_random_drafts_are_varied(loaded: Loaded) -> None:
    k = loaded.draft.block_size - 1
    steps = loaded.draft.simulate(loaded.prompt(10, seed=10), 20, k)
    assert len({tuple(step.proposals) for step in steps}) >= 15
    assert np.mean([len(set(step.proposals)) for step in steps]) > 0.4 * k


def test_reduced_vocabulary_names_distinct_tokens(load: Callable[[str], Loaded]) -> None:
    ids = load("narrow").draft.target_ids.tolist()
    assert len(set(ids)) == 128
    assert set(ids) <= set(range(512))


def test_the_agreeing_pair_accepts_runs_of_every_length(agreeing: Loaded) -> None:
    k = 5
    steps = [
        step
        for seed in range(4)
        for step in agreeing.draft.simulate(agreeing.prompt(10, seed=seed), 50, k)
    ]
    assert 0.6 <= acceptance_per_position(steps)[0] <= 0.9
    runs = np.bincount([step.num_accepted for step in steps], minlength=k + 1)
    assert runs.min() >= 5


def test_the_context_disturbs_the_agreeing_draft_a_little(agreeing: Loaded) -> None:
    contexts = [agreeing.context(agreeing.prompt(length, seed=11)) for length in (30, 40)]
    tokens = range(0, 256, 2)
    first, second = (
        torch.stack([agreeing.draft.logits(token, context) for token in tokens]).argmax(dim=-1)
        for context in contexts
    )
    assert 0.005 < (first != second).float().mean() < 0.1


def test_the_agreeing_draft_runs_on_a_cpu(agreeing: Loaded) -> None:
    config, _ = read(agreeing.folder)
    assert not {"layer_types", "sliding_window"} & config.keys()


def test_demo_draft_is_accepted_as_often_as_in_training(demo_model: Path) -> None:
    draft = DFlashReference(demo_draft_folder("dflash"), TargetReference(demo_model))
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    steps = [
        step
        for prompt in real_prompts(tokenizer)[:6]
        for step in draft.simulate(prompt, 16, 5, eos={tokenizer.eos_token_id})
    ]
    # When it was trained: 0.26, 0.04, 0.01 on other prompts of this kind.
    assert 0.18 < acceptance_per_position(steps)[0] < 0.38
    assert 1.2 < mean_acceptance_length(steps) < 1.5
