"""The references and tiny checkpoints that all other tests rest on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.chi_square import chi_square_p_value
from reference.distribution import target_distribution
from reference.eagle import (
    DraftStep,
    EagleReference,
    acceptance_per_position,
    mean_acceptance_length,
)
from reference.target import TIE_GAP, GreedyTrace, TargetReference, assert_same_greedy
from safetensors.torch import load_file, save_file
from scipy import stats
from tiny import EAGLE_PAIRS, PRESETS, TinyPair, tiny_eagle, tiny_llama
from torch import Tensor
from transformers import AutoTokenizer

K = 5


@dataclass(frozen=True)
class Loaded:
    """A preset's folders and the references that read them."""

    pair: TinyPair
    target: TargetReference
    draft: EagleReference

    def prompt(self, length: int, seed: int) -> list[int]:
        """A random prompt without special tokens."""
        ids = np.random.default_rng(seed).integers(3, len(self.target.embedding), length)
        return [int(token) for token in ids]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices lose time when they are shared among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def presets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """All pairs with an EAGLE draft, built once."""
    loaded = {}
    for name in EAGLE_PAIRS:
        pair = PRESETS[name](tmp_path_factory.mktemp(name))
        target = TargetReference(pair.target)
        loaded[name] = Loaded(pair, target, EagleReference(pair.draft, target))
    return loaded


@pytest.fixture(params=EAGLE_PAIRS)
def preset(request: pytest.FixtureRequest, presets: dict[str, Loaded]) -> Loaded:
    """Each preset in turn."""
    return presets[request.param]


# The target


@pytest.mark.parametrize("length", [1, 23])
def test_greedy_is_what_generate_writes(preset: Loaded, length: int) -> None:
    prompt = preset.prompt(length, seed=length)
    trace = preset.target.greedy(prompt, 40, eos={2})
    written = preset.target.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, length, dtype=torch.int64),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
    )
    assert trace.token_ids == written[0, length:].tolist()


def test_features_and_logits_are_those_of_the_model(preset: Loaded) -> None:
    prompt = preset.prompt(17, seed=0)
    features, logits = preset.target.features_and_logits(prompt)
    with torch.inference_mode():
        output = preset.target.model(torch.tensor([prompt]), output_hidden_states=True)
    torch.testing.assert_close(logits, output.logits[0])
    torch.testing.assert_close(features, output.hidden_states[-1][0])


def test_gaps_are_those_of_one_pass_over_the_whole_text(preset: Loaded) -> None:
    prompt = preset.prompt(9, seed=1)
    trace = preset.target.greedy(prompt, 20)
    _, logits = preset.target.features_and_logits(prompt + trace.token_ids)
    top = logits[len(prompt) - 1 : -1].topk(2).values  # [20, 2]
    np.testing.assert_allclose(trace.top2_gap, (top[:, 0] - top[:, 1]).numpy(), atol=1e-4)


@pytest.mark.parametrize("right", [0, 1, 11, 20])
def test_a_guess_changes_nothing(preset: Loaded, right: int) -> None:
    """Whichever part of it is right, in a text that ends by its length or by a token."""
    prompt = preset.prompt(9, seed=1)
    trace = preset.target.greedy(prompt, 20)
    wrong = [(token + 1) % 256 for token in trace.token_ids]
    guess = [*trace.token_ids[:right], *wrong[right:], 7, 7]
    guessed = preset.target.greedy(prompt, 20, guess=guess)
    assert guessed.token_ids == trace.token_ids
    np.testing.assert_allclose(guessed.top2_gap, trace.top2_gap, atol=1e-4)
    eos = trace.token_ids[9]
    ended = preset.target.greedy(prompt, 20, eos={eos}, guess=guess).token_ids
    assert ended == trace.token_ids[: trace.token_ids.index(eos) + 1]


def test_greedy_stops_at_eos_and_at_either_length(presets: dict[str, Loaded]) -> None:
    target, prompt = presets["llama_eagle"].target, presets["llama_eagle"].prompt(5, seed=2)
    free = target.greedy(prompt, 30).token_ids
    eos = free[7]
    assert len(free) == 30
    assert target.greedy(prompt, 30, eos={eos}).token_ids == free[: free.index(eos) + 1]
    assert target.greedy(prompt, 30, max_length=16).token_ids == free[:11]
    assert target.greedy(prompt, 3, max_length=16).token_ids == free[:3]
    assert target.greedy(prompt, 3, max_length=5).token_ids == []


# The comparison rule


def trace_of(*steps: Sequence[float]) -> GreedyTrace:
    trace = GreedyTrace()
    for logits in steps:
        trace.append(torch.tensor(logits))
    return trace


def test_identical_tokens_are_the_same() -> None:
    assert assert_same_greedy([1, 0], trace_of([0, 3, 1], [2, 1, 0])) is True


def test_a_near_tie_may_swap_and_ends_the_comparison() -> None:
    trace = trace_of([0, 3, 1], [2, 2 - TIE_GAP / 2, 0], [9, 0, 0])
    assert trace.top2_gap == pytest.approx([2, TIE_GAP / 2, 9], abs=1e-6)
    assert assert_same_greedy([1, 1, 2, 2, 2], trace) is False


@pytest.mark.parametrize(
    ("ours", "why"),
    [
        ([0, 0], "token 0 is 0"),
        ([1, 1], "token 1 is 1"),
        ([1], "1 tokens, the target has 2"),
        ([1, 0, 0], "3 tokens, the target has 2"),
    ],
)
def test_other_differences_fail(ours: list[int], why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        assert_same_greedy(ours, trace_of([0, 3, 1], [2, 2 - 2 * TIE_GAP, 0]))


def test_a_near_tie_excuses_no_third_token() -> None:
    with pytest.raises(AssertionError, match="token 0 is 2"):
        assert_same_greedy([2], trace_of([3, 3 - TIE_GAP / 2, 1]))


# The EAGLE draft


def linear_draft(
    folder: Path, pair: TinyPair, *, embedding: float, feature: float, d2t: int | None = None
) -> Path:
    """A draft whose rows are ``embedding * e + feature * f``: its decoder layer adds nothing."""
    tiny_eagle(folder, pair.target, d2t=d2t)
    tensors = load_file(folder / "model.safetensors")
    eye = torch.eye(len(tensors["fc.weight"]))
    tensors["fc.weight"] = torch.cat([embedding * eye, feature * eye], dim=1)
    for name, tensor in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_draft_that_hands_on_the_feature_repeats_the_next_token(
    presets: dict[str, Loaded], tmp_path: Path
) -> None:
    loaded = presets["llama_eagle"]
    folder = linear_draft(tmp_path, loaded.pair, embedding=0, feature=1)
    draft = EagleReference(folder, loaded.target)
    steps = draft.simulate(loaded.prompt(6, seed=3), 10, K)
    assert [step.proposals for step in steps] == [[step.next_token] * K for step in steps]


@pytest.mark.parametrize("d2t", [None, 100])
def test_a_draft_that_hands_on_the_embedding_follows_the_head(
    presets: dict[str, Loaded], tmp_path: Path, d2t: int | None
) -> None:
    loaded = presets["llama_eagle_biased"]
    folder = linear_draft(tmp_path, loaded.pair, embedding=1, feature=0, d2t=d2t)
    draft = EagleReference(folder, loaded.target)
    scores = loaded.target.embedding @ loaded.target.head.T  # [V, V]
    if d2t is not None:
        offsets = load_file(folder / "model.safetensors")["d2t"]
        proposable = torch.arange(d2t) + offsets
        banned = torch.ones(len(scores), dtype=torch.bool)
        banned[proposable] = False
        scores = scores.masked_fill(banned, float("-inf"))
    successor = scores.argmax(dim=-1).tolist()
    for step in draft.simulate(loaded.prompt(6, seed=4), 10, K):
        expected = [step.next_token]
        for _ in range(K):
            expected.append(successor[expected[-1]])
        assert step.proposals == expected[1:]


def test_proposals_kept_caches_and_anew_agree(preset: Loaded) -> None:
    for length in (1, 30):
        ids = preset.prompt(length, seed=5)
        for step in preset.draft.simulate(ids, 12, K):
            assert step.verified_length == len(ids)
            features, logits = preset.target.features_and_logits(ids)
            assert step.next_token == int(logits[-1].argmax())
            ids.append(step.next_token)
            assert step.proposals == preset.draft.propose(ids, features, K)
            ids += step.proposals[: step.num_accepted]


def test_simulated_text_is_the_targets_greedy_text(preset: Loaded) -> None:
    prompt = preset.prompt(8, seed=6)
    steps = preset.draft.simulate(prompt, 25, K)
    text = [
        token for step in steps for token in [step.next_token, *step.proposals[: step.num_accepted]]
    ]
    assert_same_greedy(text, preset.target.greedy(prompt, len(text)))


@pytest.mark.parametrize("name", ["llama_eagle", "llama_eagle_biased", "llama_eagle_bfloat16"])
def test_proposals_depend_on_features_and_on_history(presets: dict[str, Loaded], name: str) -> None:
    loaded = presets[name]
    prompt = loaded.prompt(20, seed=7)
    features, _ = loaded.target.features_and_logits(prompt[:-1])
    proposals = loaded.draft.propose(prompt, features, K)
    assert loaded.draft.propose(prompt, features.roll(1, dims=0), K) != proposals
    assert loaded.draft.propose(prompt[1:], features[1:], K) != proposals


def test_the_agreeing_pair_sees_a_wrong_feature(presets: dict[str, Loaded]) -> None:
    """Most engine tests run it: a feature of another position, or none, must not go unseen."""
    loaded = presets["llama_eagle_agreeing"]
    prompt = loaded.prompt(60, seed=9)
    features, _ = loaded.target.features_and_logits(prompt[:-1])

    def proposals(features: Tensor, first: int = 0) -> list[list[int]]:
        return [
            loaded.draft.propose(prompt[first : end + 1], features[first:end], 3)
            for end in range(4, 60, 2)
        ]

    right = proposals(features)
    for wrong in (features.roll(1, dims=0), torch.zeros_like(features)):
        changed = np.mean([a != b for a, b in zip(right, proposals(wrong), strict=True)])
        assert changed >= 0.15
    assert proposals(features, first=2) != right  # what is before has a part in it


def test_simulation_ends_with_eos(presets: dict[str, Loaded]) -> None:
    loaded = presets["llama_eagle_agreeing"]
    prompt = loaded.prompt(8, seed=8)
    text = loaded.target.greedy(prompt, 40).token_ids
    eos = text[-1]
    end = len(prompt) + text.index(eos)
    steps = loaded.draft.simulate(prompt, 40, K, eos={eos})
    assert steps[-1].verified_length < end <= steps[-1].verified_length + K + 1


def test_features_must_fit_the_tokens(presets: dict[str, Loaded]) -> None:
    with pytest.raises(ValueError, match="3 tokens need one feature less, not 3"):
        presets["llama_eagle"].draft.propose([3, 4, 5], torch.zeros(3, 64), K)


def test_a_draft_with_an_input_norm_is_refused(presets: dict[str, Loaded], tmp_path: Path) -> None:
    tiny_eagle(tmp_path, presets["llama_eagle"].pair.target)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["layers.0.input_layernorm.weight"] = torch.ones(64)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"layers\.0\.input_layernorm\.weight"):
        EagleReference(tmp_path, presets["llama_eagle"].target)


def test_acceptance_is_counted_per_position() -> None:
    steps = [DraftStep(0, 0, [1, 1, 1], accepted) for accepted in (0, 1, 3, 3)]
    assert acceptance_per_position(steps) == [0.75, 0.5, 0.5]
    assert mean_acceptance_length(steps) == 2.75


# The target distribution

LOGITS = np.log([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 0, "logit_bias": {3: 9.0}}, [0, 0, 0, 1]),
        ({"temperature": 1, "top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1, "top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1, "top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 1, "top_k": 3, "top_p": 0.75}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1, "min_p": 0.4}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 0.5, "min_p": 0.4}, [16 / 25, 9 / 25, 0, 0]),
        ({"temperature": 1, "logit_bias": {3: np.log(3)}}, [4 / 12, 3 / 12, 2 / 12, 3 / 12]),
        (
            {"temperature": 1, "allowed": np.array([False, True, False, True])},
            [0, 0.75, 0, 0.25],
        ),
        (
            {"temperature": 1, "frequency_penalty": np.log(2), "generated_ids": [0, 0]},
            [1 / 7, 3 / 7, 2 / 7, 1 / 7],
        ),
        (
            {"temperature": 1, "presence_penalty": np.log(2), "generated_ids": [0, 0]},
            [2 / 8, 3 / 8, 2 / 8, 1 / 8],
        ),
        ({"temperature": 1, "presence_penalty": 1, "prompt_ids": [0, 1]}, [0.4, 0.3, 0.2, 0.1]),
        (
            {"temperature": 1, "repetition_penalty": 2, "prompt_ids": [0], "generated_ids": [1, 1]},
            [0.16 / 0.55, 0.09 / 0.55, 0.2 / 0.55, 0.1 / 0.55],
        ),
    ],
)
def test_distribution_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    np.testing.assert_allclose(target_distribution(LOGITS, **options), expected, atol=1e-12)


def test_repetition_penalty_shrinks_positive_logits() -> None:
    probs = target_distribution(
        [2.0, 1.0], temperature=1, repetition_penalty=2, generated_ids=[0], presence_penalty=1
    )
    np.testing.assert_allclose(probs, [1 / (1 + np.e), np.e / (1 + np.e)])


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_ties_are_kept(options: dict[str, Any]) -> None:
    logits = np.log([0.4, 0.2, 0.2, 0.2])
    probs = target_distribution(logits, temperature=1, **options)
    np.testing.assert_allclose(probs, [0.4, 0.2, 0.2, 0.2])


def test_top_p_stops_at_a_mass_that_just_suffices() -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    probs = target_distribution(logits, temperature=1, top_p=0.75)
    np.testing.assert_allclose(probs, [2 / 3, 1 / 3, 0, 0])


def test_temperature_zero_takes_the_first_of_a_tie() -> None:
    assert target_distribution([0.0, 5.0, 5.0], temperature=0).tolist() == [0, 1, 0]


def test_a_grammar_that_allows_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token is allowed"):
        target_distribution(LOGITS, temperature=1, allowed=np.zeros(4, dtype=bool))


# The chi-square test


def test_p_value_is_scipys_where_no_cell_is_pooled() -> None:
    counts, probs = np.array([30, 45, 25]), np.array([0.3, 0.5, 0.2])
    expected = stats.chisquare(counts, 100 * probs).pvalue
    assert chi_square_p_value(counts, probs) == pytest.approx(expected)


def test_rare_cells_are_pooled() -> None:
    counts = [2, 3, 50, 45, 0]
    probs = [0.02, 0.04, 0.44, 0.49, 0.01]
    expected = stats.chisquare([5, 50, 45], [7, 44, 49]).pvalue
    assert chi_square_p_value(counts, probs) == pytest.approx(expected)
    assert chi_square_p_value([1, 9], [0.01, 0.99]) == 1.0


def test_p_values_of_true_samples_are_uniform_and_a_bent_distribution_is_rejected() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(300, 0.3))
    p_values = [chi_square_p_value(rng.multinomial(5000, probs), probs) for _ in range(300)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.001
    bent = probs * rng.uniform(0.8, 1.2, 300)
    counts = rng.multinomial(100_000, bent / bent.sum())
    assert chi_square_p_value(counts, probs) < 1e-6


def test_an_impossible_token_is_rejected() -> None:
    assert chi_square_p_value([500, 500, 1], [0.5, 0.5, 0]) == 0.0


@pytest.mark.parametrize(
    ("counts", "probs", "why"),
    [
        ([9, 9], [0.5, 0.25, 0.25], "counts have shape"),
        ([9, 9], [0.5, 0.4], "not 1"),
        ([1, 1], [0.5, 0.5], "2 samples are fewer than 5.0"),
    ],
)
def test_chi_square_refuses_what_it_cannot_judge(
    counts: list[int], probs: list[float], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        chi_square_p_value(counts, probs)


# The tiny checkpoints


def test_greedy_text_is_varied_and_near_ties_are_rare(preset: Loaded) -> None:
    traces = [preset.target.greedy(preset.prompt(n, seed=n), 64) for n in (1, 5, 12, 30)]
    assert min(len(set(trace.token_ids)) for trace in traces) >= 24
    assert len({tuple(trace.token_ids) for trace in traces}) == len(traces)
    assert np.mean([np.array(trace.top2_gap) < 1e-2 for trace in traces]) < 0.03


def test_the_agreeing_pair_accepts_runs_of_every_length(presets: dict[str, Loaded]) -> None:
    loaded = presets["llama_eagle_agreeing"]
    steps = [
        step
        for seed in range(4)
        for step in loaded.draft.simulate(loaded.prompt(10, seed=seed), 50, K)
    ]
    assert 0.6 <= acceptance_per_position(steps)[0] <= 0.9
    runs = np.bincount([step.num_accepted for step in steps], minlength=K + 1)
    assert runs.min() >= 5


def test_tokenizer_reads_back_what_it_wrote(preset: Loaded) -> None:
    tokenizer = AutoTokenizer.from_pretrained(preset.pair.target)
    text = 'Grüße, "world" {1: 2}\n\t日本 ok'
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == len(preset.target.embedding)
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    special = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (0, 1, 2)


def test_reduced_vocabulary_names_distinct_tokens(presets: dict[str, Loaded]) -> None:
    ids = presets["llama_eagle_bfloat16"].draft.target_ids.tolist()
    assert len(set(ids)) == 128
    assert set(ids) <= set(range(512))


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 16,
    "vocab_size": 248,
    "tie": False,
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_stored_in_the_given_type(tmp_path: Path, dtype: str) -> None:
    target = tiny_llama(tmp_path / "target", **SHAPE, dtype=dtype)
    draft = tiny_eagle(tmp_path / "draft", target, d2t=9)
    for folder in (target, draft):
        types = {
            name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()
        }
        assert types.pop("d2t", torch.int64) == torch.int64
        assert set(types.values()) == {getattr(torch, dtype)}


def test_rope_variants_differ(tmp_path: Path) -> None:
    ids = list(range(3, 90))
    logits = [
        TargetReference(tiny_llama(tmp_path / rope, **SHAPE, rope=rope)).features_and_logits(ids)[1]
        for rope in ("default", "linear", "llama3")
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (logits[one] - logits[other]).abs().max() > 0.1


def test_vocabulary_must_hold_the_bytes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="248 to 935 tokens, not 100"):
        tiny_llama(tmp_path, **(SHAPE | {"vocab_size": 100}))
