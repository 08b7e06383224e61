"""Training drafts: they learn, survive kills, and are what the graph runs."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner, Result
from prompts import random_prompt, real_prompts
from reference.dflash import DFlashReference
from reference.eagle import EagleReference
from reference.target import TargetReference
from runs import greedy_requests
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_draft_proposals import recording
from tiny import TinyPair
from torch import Tensor
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from unispec.checkpoints.demo import demo_draft_folder
from unispec.cli import unispec
from unispec.engine import Engine, EngineConfig
from unispec.errors import InputError
from unispec.methods import DRAFT_METHODS, Method
from unispec.training import (
    Collection,
    CollectSettings,
    DraftShape,
    FitSettings,
    TorchTarget,
    collect,
    fit,
    make_draft,
    publish,
)
from unispec.training.answering import draw
from unispec.training.attention import GROUPED
from unispec.training.collection import Collected, read_num_shards
from unispec.training.draft import Draft
from unispec.training.fitting import History, Measure
from unispec.training.methods import check_beginning
from unispec.training.prompts import built_in_prompts

METHODS = pytest.mark.parametrize("method", DRAFT_METHODS)
PROMPTS = [f"{a} {b} and {a}" for a in "abcdefgh" for b in "stuvwx"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 48, "chat_template": False}
SHAPES = {
    "eagle": DraftShape(method="eagle"),
    "dflash": DraftShape(method="dflash", layers=2, block_size=4),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def target(tiny_pair: Callable[[str], TinyPair]) -> TorchTarget:
    """Its next token is mostly a function of the current one, which can be learnt."""
    return TorchTarget(str(tiny_pair("llama_eagle_agreeing").target))


@pytest.fixture(scope="module")
def collected(
    target: TorchTarget, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Method], Collection]:
    """6,000 tokens of answers with a method's features, collected once each."""
    done: dict[Method, Collection] = {}

    def of(method: Method) -> Collection:
        if method not in done:
            layers = SHAPES[method].tapped_layers(target.config)
            settings = CollectSettings(layers=layers, tokens=6000, **SETTINGS)
            folder = tmp_path_factory.mktemp(f"data_{method}")
            done[method] = collect(target, PROMPTS, settings, folder)
        return done[method]

    return of


def untrained(target: TorchTarget, collection: Collection, method: Method) -> Draft:
    return make_draft(target, collection, SHAPES[method], seed=1)


# What is collected


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_beyond_float16_are_its_largest(
    tiny_pair: Callable[[str], TinyPair], dtype: torch.dtype
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
    with pytest.raises(ArithmeticError, match="no number"):
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


# The fit


@METHODS
def test_a_little_training_lifts_acceptance(
    target: TorchTarget, collected: Callable[[Method], Collection], tmp_path: Path, method: Method
) -> None:
    collection = collected(method)
    draft = untrained(target, collection, method)
    settings = FitSettings(epochs=12, learning_rate=3e-3)
    history = fit(draft, collection, settings, tmp_path / "state.pt")
    before, after = history.measures[0], history.measures[-1]
    assert before.acceptance[0] < 0.1
    assert after.acceptance[0] > 0.4
    assert after.length > before.length + 0.4
    assert after.loss < 0.6 * history.losses[0]


@METHODS
def test_a_fit_in_bfloat16_goes_the_way_of_one_in_float32(
    target: TorchTarget, collected: Callable[[Method], Collection], tmp_path: Path, method: Method
) -> None:
    collection, last = collected(method), []
    for dtype in (torch.float32, torch.bfloat16):
        draft = untrained(target, collection, method)
        settings = FitSettings(epochs=2, learning_rate=3e-3, dtype=dtype)
        history = fit(draft, collection, settings, tmp_path / f"{dtype}.pt")
        assert all(one.dtype == torch.float32 for one in draft.parameters())
        last.append((history.losses, history.measures[-1]))
    (exact, end), (rounded_losses, other_end) = last
    assert exact != rounded_losses
    assert exact == pytest.approx(rounded_losses, rel=0.05)
    assert other_end.length == pytest.approx(end.length, abs=0.1)


def test_a_target_in_bfloat16(tiny_pair: Callable[[str], TinyPair]) -> None:
    """What it keeps while it answers is what one pass over the whole gives, but for rounding."""
    prompts = [random_prompt(256, length, seed=length) for length in (5, 30)]
    rough = TorchTarget(str(tiny_pair("llama_eagle_agreeing").target), dtype=torch.bfloat16)
    for one in rough.answers(prompts, [0, 0.7], (), 20, seed=0):
        with torch.inference_mode():
            whole = rough.model.get_decoder()(torch.tensor([one.tokens])).last_hidden_state[0]
        assert whole.dtype == torch.bfloat16
        error = (one.features[:-1] - whole[:-1]).float().norm() / whole.float().norm()
        assert 0 < error < 0.02


@METHODS
def test_what_a_fit_in_bfloat16_keeps_exact(
    target: TorchTarget, collected: Callable[[Method], Collection], method: Method
) -> None:
    """What layers add to, and the loss; of EAGLE also the target's distributions."""
    collection = collected(method)
    draft = untrained(target, collection, method)
    batch = [collection.read(place) for place in collection.training[:4]]
    kinds: list[torch.dtype] = []
    for layer in cast(Any, draft).layers:
        layer.register_forward_hook(lambda _, inputs, output: kinds.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = draft.loss(batch, torch.Generator().manual_seed(0))
    assert set(kinds) == {torch.float32}
    assert loss.dtype == torch.float32
    exact = draft.loss(batch, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)


@METHODS
def test_a_killed_fit_ends_as_one_that_ran_through(
    target: TorchTarget,
    collected: Callable[[Method], Collection],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
) -> None:
    monkeypatch.setattr("unispec.training.fitting.SAVE_SECONDS", 0.0)
    collection, settings = collected(method), FitSettings(epochs=1)

    def kill(history: History, done: float) -> None:
        if history.step == 6:
            raise KeyboardInterrupt

    whole = untrained(target, collection, method)
    through = fit(whole, collection, settings, tmp_path / "whole.pt")
    killed = untrained(target, collection, method)
    with pytest.raises(KeyboardInterrupt):
        fit(killed, collection, settings, tmp_path / "killed.pt", kill)
    resumed = untrained(target, collection, method)
    history = fit(resumed, collection, settings, tmp_path / "killed.pt")
    assert history.losses == through.losses
    assert history.measures[1:] == through.measures[1:]
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("method", "layers"), [("eagle", 1), ("eagle", 2), ("dflash", 3)])
def test_measured_matches_are_what_decoding_accepts(
    target: TorchTarget,
    collected: Callable[[Method], Collection],
    tiny_target: Callable[[str], TargetReference],
    tmp_path: Path,
    method: Method,
    layers: int,
) -> None:
    """The first proposals at every measured place, and runs of several, by the reference."""
    collection = collected(method)
    draft = make_draft(target, collection, replace(SHAPES[method], layers=layers), seed=1)
    fit(draft, collection, FitSettings(epochs=2, learning_rate=3e-3), tmp_path / "state.pt")
    publish(draft, History(measures=[Measure(0, 1.0, [0.5])]), card(), tmp_path)
    rounded(draft)
    references: dict[Method, Any] = {"eagle": EagleReference, "dflash": DFlashReference}
    reference = references[method](tmp_path, tiny_target("llama_eagle_agreeing"))
    one = collection.read(collection.held_out[0])
    taps = SHAPES[method].tapped_layers(target.config)
    one = replace(one, features=features(target, one.tokens.tolist(), taps))
    k, ids = draft.num_proposals, one.tokens.tolist()
    found = draft.matches(one)
    every = 1 if method == "eagle" else 3
    assert len(found) >= 8
    for row, right in enumerate(found):
        known = ids[: one.prompt_length + 1 + every * row]  # the last is the target's next token
        proposals = (
            reference.propose(
                known, tiny_target("llama_eagle_agreeing").features_and_logits(known[:-1])[0], k
            )
            if method == "eagle"
            else reference.propose(known, k)
        )
        follow = ids[len(known) : len(known) + k]
        expected = [a == b for a, b in zip(proposals, follow, strict=True)]
        agreed = next((i for i, ok in enumerate(expected) if not ok), k)
        assert right[: agreed + 1].tolist() == expected[: agreed + 1]


def test_void_rows_of_an_eagle_draft_are_not_learnt_from(
    target: TorchTarget, collected: Callable[[Method], Collection]
) -> None:
    """Of a prompt of one token, the first row has nothing before it in the second pass."""
    draft: Any = untrained(target, collected("eagle"), "eagle")
    generator = torch.Generator().manual_seed(0)
    width = target.config.hidden_size

    def answer(length: int) -> Collected:
        tokens = torch.randint(0, 256, (length,), generator=generator)
        return Collected(tokens, torch.randn(length, width, generator=generator), 1)

    assert draft.loss([answer(3)], generator) == 0
    one = answer(4)
    truth = one.features[2]
    spread = one.features[:-1].std()
    expected = 0.0
    for output in draft.outputs(one.tokens[None], one.features[None], 2):
        ours = output[0, 1]  # speaks for the last token
        soft = (draft.head @ truth).softmax(dim=-1)
        expected -= (soft * (draft.head @ ours).log_softmax(dim=-1)).sum().item() / 2
        away = ((ours - truth) / spread).abs()
        smooth = torch.where(away < 1, away**2 / 2, away - 0.5).mean().item()
        expected += 0.1 * smooth / 2
    assert draft.loss([one], generator).item() == pytest.approx(expected, rel=1e-5)


def card() -> dict[str, str]:
    return {"model": "a tiny model", "method": "eagle"}


def rounded(draft: Draft) -> None:
    """Gives the module the weights that its checkpoint has."""
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(parameter.half().float())


def features(
    target: TorchTarget | TargetReference, ids: list[int], layers: Sequence[int]
) -> Tensor:
    """Not rounded to float16, as in decoding."""
    with torch.inference_mode():
        output = target.model(torch.tensor([ids]), output_hidden_states=True)
    states = output.hidden_states
    return torch.cat([states[i + 1][0] for i in layers] or [states[-1][0]], dim=-1).clone()


@METHODS
def test_the_graph_runs_what_was_fitted(
    demo_model: Path, demo_engines: Callable[[Method], Engine], tmp_path: Path, method: Method
) -> None:
    """The module's own proposals for SmolLM2, at every step of some answers.

    The draft has the shape of the packaged one, whose graph is compiled already.
    """
    assert demo_engines(method).pipeline
    target = TorchTarget(str(demo_model))
    packaged = json.loads((demo_draft_folder(method) / "config.json").read_text())
    shape = DraftShape(
        method=method,
        vocab_size=packaged["draft_vocab_size"],
        mask_token_id=packaged.get("dflash_config", {}).get("mask_token_id"),
    )
    settings = CollectSettings(
        layers=shape.tapped_layers(target.config), tokens=1, max_new_tokens=8
    )
    collection = collect(target, built_in_prompts()[:12], settings, tmp_path / "data")
    draft: Any = make_draft(target, collection, shape, seed=3)
    if method == "eagle":
        with torch.no_grad():  # they begin small, and a wrong attention would hide
            for name, parameter in draft.layers.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.mul_(10)
    rounded(draft)
    publish(draft, History(measures=[Measure(0, 1.0, [0.5])]), card(), tmp_path)
    engine = Engine(
        EngineConfig(
            model=str(demo_model),
            draft_model=str(tmp_path),
            speculative_method=method,
            num_speculative_tokens=5,
            max_batch_size=8,
            max_length=2048,
        )
    )
    prompts = [ids[:100] for ids in real_prompts(engine.tokenizer)[:4]]
    with recording(engine) as recorded:
        engine.generate(greedy_requests(prompts, 8))
    same = []
    for steps in recorded.values():
        for step in steps:
            ids = step.token_ids
            read = features(target, ids, settings.layers)
            with torch.inference_mode():
                if method == "eagle":
                    tokens = torch.tensor([[*ids, *step.drafts]])
                    read = torch.cat([read, read.new_zeros(5, read.shape[1])])
                    rows = [
                        output[0, len(ids) - 2 + number]
                        for number, output in enumerate(draft.outputs(tokens, read[None], 5))
                    ]
                    outputs = torch.stack(rows)
                else:
                    anchors = torch.tensor([[len(ids) - 1]])
                    outputs = draft.outputs(torch.tensor([ids]), read[None], anchors)[0, 0]
                same += (draft.proposed(outputs) == torch.tensor(step.drafts)).tolist()
    assert len(same) >= 100
    assert sum(same) >= 0.99 * len(same)


# The command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(unispec, ["train", *map(str, arguments)])


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts"
    path.write_text("\n".join(PROMPTS))
    return path


@METHODS
def test_the_command_makes_a_draft_that_generate_loads(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, prompt_file: Path, method: Method
) -> None:
    model, output = tiny_pair("llama_eagle_agreeing").target, tmp_path / "draft"
    given: list[object] = ["--model", model, "--speculative-method", method, "--output", output]
    given += ["--prompts", prompt_file, "--tokens", 1500, "--epochs", 1, "--no-chat-template"]
    given += ["--max-new-tokens", 32, "--draft-vocab-size", 100]
    done = run(*given)
    assert done.exit_code == 0, done.output
    assert "Held-out length" in done.stderr
    record = json.loads((output / "training.json").read_text())
    assert record["settings"]["dtype"] == "float32"
    assert record["settings"]["sequences"] > record["settings"]["held-out sequences"] > 0
    assert record["measures"][-1]["length"] == 1 + sum(record["measures"][-1]["acceptance"])
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "Held-out acceptance" in (output / "README.md").read_text()
    assert "/" not in (output / "config.json").read_text()  # no folder of this machine
    assert load_file(output / "model.safetensors")["d2t"].shape == (100,)
    # Reads the configurations of both and refuses what does not fit.
    Engine(EngineConfig(model=str(model), draft_model=str(output), speculative_method=method))

    again = run(*given)
    assert again.exit_code == 2
    assert f"{output} is not empty; give --resume" in again.stderr.replace("\n", "")
    weights = (output / "model.safetensors").read_bytes()
    assert run(*given, "--resume").exit_code == 0
    assert (output / "model.safetensors").read_bytes() == weights
    other = run(*given, "--resume", "--max-new-tokens", 16)
    assert other.exit_code == 2
    assert "was collected with max_new_tokens 32, not 16" in other.stderr
    other = run(*given, "--resume", "--dtype", "bfloat16")
    assert other.exit_code == 2
    assert "was collected with dtype 'float32', not 'bfloat16'" in other.stderr.replace("\n", "")

    onwards = [*given, "--dtype", "bfloat16", "--draft-model-path", output]
    onwards[onwards.index("--output") + 1] = tmp_path / "onwards"
    done = run(*onwards)
    assert done.exit_code == 0, done.output
    later = json.loads((tmp_path / "onwards" / "training.json").read_text())
    assert later["settings"]["dtype"] == "bfloat16"
    assert later["settings"]["began with"].startswith("draft, sha256 ")
    ended, began = record["measures"][-1]["length"], later["measures"][0]["length"]
    assert began == pytest.approx(ended, abs=0.1)  # other answers, by a target in bfloat16
    onwards[onwards.index("--output") + 1] = tmp_path / "other"
    other = run(*onwards, "--draft-layers", 5)
    assert other.exit_code == 2
    assert "where this draft has 5" in other.stderr.replace("\n", " ")
    assert not (tmp_path / "other").exists()


def test_a_command_that_is_killed_twice(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, prompt_file: Path
) -> None:
    """By SIGKILL: while it collects, and while it fits. What comes out is what would have."""
    given = ["--model", tiny_pair("llama_eagle_agreeing").target, "--speculative-method", "eagle"]
    given += ["--prompts", prompt_file, "--tokens", 5000, "--epochs", 2, "--no-chat-template"]
    given += ["--max-new-tokens", 48]
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "unispec.cli", "train", *map(str, given), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for sign in ("data/shard-00000.safetensors", "training/collected.json"):
        process = subprocess.Popen(
            [*command, "--output", str(output)], env=environment, stderr=subprocess.PIPE
        )
        while not (output / sign).exists():
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert not (output / "config.json").exists()
        assert not [path for path in output.rglob("*") if ".tmp" in path.name]
    assert run(*given, "--output", output, "--resume").exit_code == 0
    assert run(*given, "--output", tmp_path / "whole").exit_code == 0
    ours, theirs = (
        load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"--no-chat-template": None}, "no chat template", id="no-chat-template"),
        pytest.param({"--tokens": 5, "--minutes": 1}, "exclude each other", id="two-ends"),
        pytest.param(
            {"--own-prompts": True}, "--own-prompts and --no-chat-template exclude", id="own"
        ),
        pytest.param({"--device": "cuda"}, "torch finds no GPU", id="cuda"),
        pytest.param({"--draft-vocab-size": 300}, "300 is beyond the target's 256", id="vocab"),
        pytest.param({"--model": "/nowhere"}, "/nowhere", id="no-model"),
        pytest.param({"--minutes": 0}, "0", id="no-time"),
    ],
)
def test_options_that_are_refused(
    tiny_pair: Callable[[str], TinyPair],
    tmp_path: Path,
    prompt_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options: dict[str, object] = {
        "--model": tiny_pair("llama_eagle_agreeing").target,
        "--speculative-method": "eagle",
        "--output": tmp_path / "draft",
        "--prompts": prompt_file,
        "--tokens": 10,
        "--max-new-tokens": 8,
        "--no-chat-template": True,
    } | changes
    if "--minutes" in changes and "--tokens" not in changes:
        del options["--tokens"]
    given: list[object] = []
    for name, value in options.items():
        given += [name] if value is True else [] if value is None else [name, value]
    done = run(*given)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no prompt"), ("one\n\ntwo", "line 2"), ("only one", "give at least two")],
)
def test_prompt_files_that_are_refused(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "prompts"
    path.write_text(text)
    given = [
        "--model",
        tiny_pair("llama_eagle_agreeing").target,
        "--speculative-method",
        "eagle",
        "--prompts",
        path,
    ]
    done = run(*given, "--output", tmp_path / "draft", "--no-chat-template")
    assert done.exit_code == 2
    assert message in done.stderr


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
    with pytest.raises(InputError, match=r"sliding_window 32 of .* up to 33 tokens: shorten"):
        mistral.write([[5] * 3, [5] * 24], [0.0, 0.0], 9, [2], 0)


def test_a_full_disk(target: TorchTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    settings = CollectSettings(tokens=10, **SETTINGS)
    with pytest.raises(
        InputError, match=r"shard-00000.* cannot be written \(No space left.*make room"
    ):
        collect(target, PROMPTS, settings, tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_shard(target: TorchTarget, tmp_path: Path) -> None:
    settings = CollectSettings(tokens=10, **SETTINGS)
    collect(target, PROMPTS, settings, tmp_path)
    shard = tmp_path / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:20])
    with pytest.raises(InputError, match=r"shard-00000\.safetensors is damaged"):
        collect(target, PROMPTS, settings, tmp_path)

    shard.write_bytes(whole)
    with safe_open(shard, framework="pt") as file:
        texts = file.metadata()["prompts"]
    tensors = load_file(shard)
    lengths, prompt_lengths = tensors["lengths"], tensors["prompt_lengths"]
    for changed, prompts in [
        ({"lengths": lengths[1:].clone()}, texts),
        ({"lengths": lengths + 1}, texts),
        ({"lengths": lengths[:, None].clone()}, texts),
        ({"prompt_lengths": lengths.clone()}, texts),
        ({"prompt_lengths": prompt_lengths - 1000}, texts),
        ({"held_out": tensors["held_out"] + 2}, texts),
        ({"tokens": tensors["tokens"][1:].clone()}, texts),
        ({"features": tensors["features"][1:].clone()}, texts),
        ({}, None),
        ({}, "7"),
        ({}, "[7]"),
        ({}, "[" * 100_000),
        ({}, json.dumps(json.loads(texts)[1:])),
    ]:
        save_file(tensors | changed, shard, None if prompts is None else {"prompts": prompts})
        with pytest.raises(
            InputError, match=r"^\S*shard-00000\.safetensors is damaged \(.*\): .*$"
        ):
            collect(target, PROMPTS, settings, tmp_path)
    save_file({name: tensors[name] for name in tensors if name != "features"}, shard)
    with pytest.raises(InputError, match=r"shard-00000\.safetensors is damaged"):
        collect(target, PROMPTS, settings, tmp_path)

    outside = torch.where(torch.arange(len(tensors["tokens"])) == 3, 256, tensors["tokens"])
    save_file(tensors | {"tokens": outside.int()}, shard, {"prompts": texts})
    found = collect(target, PROMPTS, settings, tmp_path)
    with pytest.raises(InputError, match=r"damaged \(token 256 is not one of the target's 256\)"):
        make_draft(target, found, SHAPES["eagle"], seed=1)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": ' * 50_000, "\x00"])
def test_a_damaged_list_of_settings(target: TorchTarget, tmp_path: Path, content: str) -> None:
    settings = CollectSettings(tokens=10, **SETTINGS)
    collect(target, PROMPTS, settings, tmp_path)
    (tmp_path / "collection.json").write_text(content)
    with pytest.raises(InputError, match=r"^\S*collection\.json is .*: give another folder$"):
        collect(target, PROMPTS, settings, tmp_path)


@pytest.mark.parametrize(
    "content", ["", "7", "{}", '{"shards": "1"}', '{"shards": 0}', "[" * 50_000]
)
def test_a_damaged_count_of_shards(tmp_path: Path, content: str) -> None:
    path = tmp_path / "collected.json"
    path.write_text('{"shards": 12}')
    assert read_num_shards(path) == 12
    path.write_text(content)
    with pytest.raises(InputError, match=r"^\S*collected\.json .*: delete it and resume$"):
        read_num_shards(path)


def test_a_gap_is_filled_and_what_lies_behind_it_stays(target: TorchTarget, tmp_path: Path) -> None:
    settings = CollectSettings(tokens=3500, **SETTINGS)
    whole = collect(target, PROMPTS, settings, tmp_path)
    assert whole.num_shards >= 2
    first, last = tmp_path / "shard-00000.safetensors", whole.training[-1].shard
    kept, written = first.read_bytes(), last.stat().st_mtime_ns
    first.unlink()
    again = collect(target, PROMPTS, settings, tmp_path)
    assert first.read_bytes() == kept
    assert again.training == whole.training
    assert last.stat().st_mtime_ns == written


def test_a_fit_keeps_the_data_that_it_began_with(target: TorchTarget, tmp_path: Path) -> None:
    settings = CollectSettings(tokens=1, **SETTINGS)
    few = collect(target, PROMPTS, settings, tmp_path)
    grown = collect(target, PROMPTS, replace(settings, tokens=3500), tmp_path)
    assert grown.num_shards > few.num_shards == 1
    assert collect(target, PROMPTS, settings, tmp_path, shards=1).training == few.training
    with pytest.raises(InputError, match="of the 9 shards that the fit began with"):
        collect(target, PROMPTS, settings, tmp_path, shards=9)


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


def test_an_answer_of_one_token_teaches_nothing_and_harms_nothing(
    target: TorchTarget, collected: Callable[[Method], Collection]
) -> None:
    one = collected("eagle").read(collected("eagle").training[0])
    short = replace(one, tokens=one.tokens[:2], features=one.features[:2], prompt_length=1)
    draft = untrained(target, collected("eagle"), "eagle")
    loss = draft.loss([short], torch.Generator())
    loss.backward()
    assert loss.item() == 0


@METHODS
def test_a_fit_begins_with_another_draft(
    target: TorchTarget, collected: Callable[[Method], Collection], tmp_path: Path, method: Method
) -> None:
    """It begins at the acceptance that the other ended with, whatever tokens it proposes."""
    collection, shape = collected(method), SHAPES[method]
    first = make_draft(target, collection, replace(shape, mask_token_id=7), seed=1)
    history = fit(first, collection, FitSettings(epochs=4, learning_rate=3e-3), tmp_path / "a.pt")
    folder = tmp_path / "draft"
    folder.mkdir()
    publish(first, history, card(), folder)
    again = make_draft(target, collection, shape, seed=5, begin_with=folder)
    onwards = fit(again, collection, FitSettings(seconds=1e-3), tmp_path / "b.pt")
    ended, began = history.measures[-1], onwards.measures[0]
    assert began.acceptance == pytest.approx(ended.acceptance, abs=0.02)  # stored in float16
    assert ended.acceptance[0] > 0.15
    fewer = make_draft(target, collection, replace(shape, vocab_size=50), 5, begin_with=folder)
    assert len(fewer.target_ids) == 50
    rounded(first)
    assert all(map(torch.equal, fewer.parameters(), first.parameters()))
    with pytest.raises(
        InputError,
        match=r"another draft to begin with \(draft, sha256 \w{12}, not random weights\)",
    ):
        fresh = make_draft(target, collection, replace(shape, mask_token_id=7), seed=5)
        fit(fresh, collection, FitSettings(seconds=1e-3), tmp_path / "b.pt")


def test_drafts_that_no_fit_can_begin_with(target: TorchTarget, tmp_path: Path) -> None:
    shape = DraftShape(method="eagle")
    collection = collect(target, PROMPTS, CollectSettings(tokens=1, **SETTINGS), tmp_path / "data")
    draft = make_draft(target, collection, shape, seed=1)
    folder = tmp_path / "draft"
    folder.mkdir()
    publish(draft, History(measures=[Measure(0, 1.0, [0.5])]), card(), folder)
    check_beginning(target.config, shape, folder)

    def refused(message: str, changed: DraftShape = shape) -> None:
        with pytest.raises(InputError, match=message):
            check_beginning(target.config, changed, folder)

    refused(r"has num_hidden_layers 1 where this draft has 2", replace(shape, layers=2))
    dflash = DraftShape(method="dflash", layers=1)
    refused(r"config\.json has the mask token None in dflash_config", dflash)
    config = json.loads((folder / "config.json").read_text())
    for wrong in (None, [], {"mask_token_id": 256}, {"mask_token_id": "1"}):
        (folder / "config.json").write_text(json.dumps(config | {"dflash_config": wrong}))
        refused("where 0 to 255 is wanted", dflash)
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    refused("has num_key_value_heads 4 where this draft has")
    (folder / "config.json").write_text(json.dumps(config))

    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    narrow = tensors | {"fc.weight": tensors["fc.weight"][:, 1:].contiguous()}
    save_file(narrow, weights)
    refused(r"has fc\.weight \[\d+, \d+\] where this draft has \[\d+, \d+\]")
    save_file({name: tensors[name] for name in tensors if name != "fc.bias"}, weights)
    refused(r"has fc\.bias missing where this draft has \[\d+\]")
    weights.write_bytes(b"no tensors")
    refused(r"model\.safetensors is not a safetensors file")
    (folder / "config.json").write_text("[]")
    refused(r"config\.json is a JSON list and no object")
    (folder / "config.json").unlink()
    refused(r"config\.json cannot be read")


def test_a_state_of_another_draft(
    target: TorchTarget, collected: Callable[[Method], Collection], tmp_path: Path
) -> None:
    collection, state = collected("eagle"), tmp_path / "state.pt"
    fit(untrained(target, collection, "eagle"), collection, FitSettings(seconds=0.1), state)
    settings = FitSettings(seconds=0.1)
    other = make_draft(target, collection, DraftShape(method="eagle", layers=2), seed=1)
    with pytest.raises(InputError, match="is of a fit with another draft"):
        fit(other, collection, settings, state)
    fewer = make_draft(target, collection, DraftShape(method="eagle", vocab_size=50), seed=1)
    with pytest.raises(InputError, match="is of a fit with another proposed tokens"):
        fit(fewer, collection, settings, state)
    same = untrained(target, collection, "eagle")
    with pytest.raises(InputError, match=r"another epochs \(10, not 3\)"):
        fit(same, collection, FitSettings(epochs=3), state)
    whole = torch.load(state)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"state\.pt is damaged"):
        fit(same, collection, settings, state)
    group = whole["optimizer"]["param_groups"][0]
    for changed in (
        7,
        [],
        {name: whole[name] for name in whole if name != "losses"},
        whole | {"identity": 7},
        whole | {"step": "one"},
        whole | {"step": whole["step"] + 1},
        whole | {"elapsed": math.nan},
        whole | {"losses": [None] * whole["step"]},
        whole | {"measures": []},
        whole | {"measures": [(10**6, 0.0, [0.0])]},
        whole | {"measures": [7]},
        whole | {"draft": {}},
        whole | {"optimizer": {"state": {}, "param_groups": [group | {"params": [0]}]}},
    ):
        torch.save(changed, state)
        with pytest.raises(InputError, match=r"^\S*state\.pt is damaged \(.*\): delete it.*$"):
            fit(same, collection, settings, state)


def test_a_state_that_cannot_be_written(
    target: TorchTarget, collected: Callable[[Method], Collection], tmp_path: Path
) -> None:
    collection = collected("eagle")
    draft, state = untrained(target, collection, "eagle"), tmp_path / "nowhere" / "state.pt"
    with pytest.raises(InputError, match=r"state\.pt cannot be written \(No such file"):
        fit(draft, collection, FitSettings(seconds=0.1), state)


def test_a_loss_that_is_not_finite(
    target: TorchTarget, collected: Callable[[Method], Collection], tmp_path: Path
) -> None:
    collection = collected("eagle")
    draft = untrained(target, collection, "eagle")
    with torch.no_grad():
        next(draft.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="the loss is nan after 0 steps: choose a lower"):
        fit(draft, collection, FitSettings(), tmp_path / "state.pt")


def test_the_built_in_prompts_are_many_and_differ() -> None:
    prompts = built_in_prompts()
    assert len(set(prompts)) == len(prompts) > 9000
    assert prompts == built_in_prompts()
    assert not [text for text in prompts if "{}" in text]
