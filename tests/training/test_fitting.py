"""Fitting a draft: it learns, survives kills, and is what the graph runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from draft_judges import recording
from prompts import real_prompts
from reference.dflash import DFlashReference
from reference.eagle import EagleReference
from reference.eagle3 import Eagle3Reference
from reference.target import TargetReference
from runs import greedy_requests
from safetensors.torch import load_file
from small_training import METHODS, SHAPES, card, features, rounded, untrained

from unispec.checkpoints.demo import DEMO_METHODS, demo_draft_folder
from unispec.engine import Engine, EngineConfig
from unispec.errors import InputError
from unispec.methods import Method
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
from unispec.training.collection import Example
from unispec.training.fitting import History, Measure
from unispec.training.prompts import built_in_prompts
from unispec.training.settings import Dtype

pytestmark = pytest.mark.usefixtures("one_thread")


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
    for dtype in get_args(Dtype):
        draft = untrained(target, collection, method)
        settings = FitSettings(epochs=2, learning_rate=3e-3, dtype=dtype)
        history = fit(draft, collection, settings, tmp_path / f"{dtype}.pt")
        assert all(one.dtype == torch.float32 for one in draft.parameters())
        last.append((history.losses, history.measures[-1]))
    (exact, end), (rounded_losses, other_end) = last
    assert exact != rounded_losses
    assert exact == pytest.approx(rounded_losses, rel=0.05)
    assert other_end.length == pytest.approx(end.length, abs=0.1)


@METHODS
def test_what_a_fit_in_bfloat16_keeps_exact(
    target: TorchTarget, collected: Callable[[Method], Collection], method: Method
) -> None:
    """What layers add to, and the loss; of EAGLE and EAGLE-3 also the target's distributions."""
    collection = collected(method)
    draft = untrained(target, collection, method)
    batch = [collection.read(place) for place in collection.training[:4]]
    kinds: list[torch.dtype] = []
    for layer in [cast(Any, draft).midlayer] if method == "eagle3" else cast(Any, draft).layers:
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


@pytest.mark.parametrize(
    ("method", "layers"), [("eagle", 1), ("eagle", 2), ("eagle3", 1), ("dflash", 3)]
)
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
    references: dict[Method, Any] = {
        "eagle": EagleReference,
        "eagle3": Eagle3Reference,
        "dflash": DFlashReference,
    }
    reference = references[method](tmp_path, tiny_target("llama_eagle_agreeing"))
    one = collection.read(collection.held_out[0])
    taps = SHAPES[method].tapped_layers(target.config)
    one = replace(one, features=features(target, one.tokens.tolist(), taps))
    k, ids = draft.num_proposals, one.tokens.tolist()
    found = draft.matches(one)
    every = 3 if method == "dflash" else 1
    assert len(found) >= 8
    for row, right in enumerate(found):
        known = ids[: one.prompt_length + 1 + every * row]  # the last is the target's next token
        proposals = (
            reference.propose(known, k)
            if method == "dflash"
            else reference.propose(
                known, reference.read(known[:-1], reference.target.new_cache())[1], k
            )
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

    def answer(length: int) -> Example:
        tokens = torch.randint(0, 256, (length,), generator=generator)
        return Example(tokens, torch.randn(length, width, generator=generator), 1)

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


def test_what_an_eagle3_draft_learns_from(
    target: TorchTarget, collected: Callable[[Method], Collection]
) -> None:
    """Rows whose answer goes on with tokens that it proposes, each pass one token further."""
    collection = collected("eagle3")
    shape = DraftShape(method="eagle3", vocab_size=200)
    draft: Any = make_draft(target, collection, shape, seed=1)
    with torch.no_grad():  # they begin small, and a wrong attention would hide
        for name, parameter in draft.midlayer.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(10)
    (known, *_), unknown = (
        draft.target_ids.tolist(),
        set(range(256)) - set(draft.target_ids.tolist()),
    )
    generator = torch.Generator().manual_seed(0)
    width = target.config.hidden_size * len(shape.tapped_layers(target.config))

    def answer(tokens: list[int]) -> Example:
        read = torch.randn(len(tokens), width, generator=generator)
        return Example(torch.tensor(tokens), read, 2)

    other = unknown.pop()
    assert draft.loss([answer([other, known, other])], generator) == 0
    # Positions 2, 3 and 5 are proposed; what follows 4 is reached by no step.
    one = answer([other, other, known, known, other, known])
    states = one.features[:, -target.config.hidden_size :]
    rows = torch.arange(5)
    outputs = draft.outputs([one], [rows < 5 - number for number in range(3)])
    expected, weights = 0.0, 0.0
    for number, places in enumerate([[0, 1, 3], [0]]):
        losses = []
        for row in places:
            soft = (draft.head @ states[row + 1 + number]).softmax(dim=-1)
            ours = (draft.head @ outputs[number][row]).log_softmax(dim=-1)
            losses.append(-(soft * ours).sum().item())
        expected += 0.8**number * sum(losses) / len(losses)
        weights += 0.8**number
    assert draft.loss([one], generator).item() == pytest.approx(expected / weights, rel=1e-5)
    # In a step with others each is learnt from as it is alone.
    before = answer([known] * 7)
    wanted = [torch.cat([torch.arange(6), rows]) < 5 - number for number in (0, 1)]
    wanted[0][:] = True
    both = draft.outputs([before, one], wanted)
    for alone, joined in zip(outputs, both, strict=False):
        torch.testing.assert_close(joined[-len(alone) :], alone)


def test_an_eagle3_draft_is_published_in_specforges_form(
    target: TorchTarget, collected: Callable[[Method], Collection], tmp_path: Path
) -> None:
    """With the head, which vLLM and SGLang read from the file, and the keys of transformers 4."""
    shape = DraftShape(method="eagle3", vocab_size=200)
    draft = make_draft(target, collected("eagle3"), shape, seed=1)
    publish(draft, History(measures=[Measure(0, 1.0, [0.5])]), card(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 1)
    assert (config["vocab_size"], config["draft_vocab_size"]) == (256, 200)
    assert config["fc_norm"] is config["norm_output"] is True
    assert config["tie_word_embeddings"] is False
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, None)
    stored = load_file(tmp_path / "model.safetensors")
    layer = {
        "hidden_norm": [64],
        "input_layernorm": [64],
        "post_attention_layernorm": [64],
        "self_attn.q_proj": [64, 128],
        "self_attn.k_proj": [32, 128],
        "self_attn.v_proj": [32, 128],
        "self_attn.o_proj": [64, 64],
        "mlp.gate_proj": [128, 64],
        "mlp.up_proj": [128, 64],
        "mlp.down_proj": [64, 128],
    }
    taps = len(shape.tapped_layers(target.config)) - 1
    expected = {f"midlayer.{name}.weight": size for name, size in layer.items()}
    expected |= {f"fc_norm.{tap}.weight": [64] for tap in range(taps)}
    expected |= {"fc.weight": [64, 64 * taps], "norm.weight": [64], "lm_head.weight": [200, 64]}
    floats = {name: list(t.shape) for name, t in stored.items() if t.dtype == torch.float16}
    assert floats == expected
    assert stored.keys() - floats.keys() == {"d2t", "t2d"}
    ids = stored["t2d"].nonzero().flatten()
    assert stored["t2d"].dtype == torch.bool
    assert torch.equal(ids, torch.arange(200) + stored["d2t"])
    assert torch.equal(stored["lm_head.weight"], target.head[ids].half())


@pytest.mark.parametrize("method", DEMO_METHODS)
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
    if method == "eagle3":
        with torch.no_grad():  # they begin small, and a wrong attention would hide
            for name, parameter in draft.midlayer.named_parameters():
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
                if method == "eagle3":
                    tokens = torch.tensor([*ids, *step.drafts])
                    read = torch.cat([read, read.new_zeros(5, read.shape[1])])
                    last = torch.arange(len(tokens) - 1) == len(ids) - 2
                    first, *later = draft.outputs(
                        [Example(tokens, read, 1)], [torch.ones_like(last), *[last] * 4]
                    )
                    outputs = torch.cat([first[last], *later])
                else:
                    anchors = torch.tensor([[len(ids) - 1]])
                    outputs = draft.outputs(torch.tensor([ids]), read[None], anchors)[0, 0]
                same += (draft.proposed(outputs) == torch.tensor(step.drafts)).tolist()
    assert len(same) >= 100
    assert sum(same) >= 0.99 * len(same)


def test_an_answer_of_one_token_teaches_nothing_and_harms_nothing(
    target: TorchTarget, collected: Callable[[Method], Collection]
) -> None:
    one = collected("eagle").read(collected("eagle").training[0])
    short = replace(one, tokens=one.tokens[:2], features=one.features[:2], prompt_length=1)
    draft = untrained(target, collected("eagle"), "eagle")
    loss = draft.loss([short], torch.Generator())
    loss.backward()
    assert loss.item() == 0


def test_a_loss_that_is_not_finite(
    target: TorchTarget, collected: Callable[[Method], Collection], tmp_path: Path
) -> None:
    collection = collected("eagle")
    draft = untrained(target, collection, "eagle")
    with torch.no_grad():
        next(draft.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="the loss is nan after 0 steps: choose a lower"):
        fit(draft, collection, FitSettings(), tmp_path / "state.pt")
