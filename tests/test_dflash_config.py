"""The fields that only a DFlash draft has: where they stand, what is refused, what K becomes."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import TinyPair, tiny_eagle

from unispec.engine import Engine, EngineConfig
from unispec.engine.pipeline_config import make_pipeline_config
from unispec.errors import InputError
from unispec.pipelines.architectures.unified_dflash_llama3 import (
    DflashDraftHFConfig,
    UnifiedDflashLlama3Config,
    UnifiedDflashLlama3Model,
)
from unispec.pipelines.drafts.dflash.config import layer_causality, layer_windows

FIELDS = {"mask_token_id": 7, "target_layer_ids": [0, 2], "block_size": 6, "num_target_layers": 4}


def engine_config(pair: TinyPair, **options: Any) -> EngineConfig:
    return EngineConfig(
        model=str(pair.target),
        draft_model=str(pair.draft),
        speculative_method="dflash",
        max_length=256,
        **options,
    )


def read_config(pair: TinyPair, **options: Any) -> UnifiedDflashLlama3Config:
    return UnifiedDflashLlama3Config.initialize(
        make_pipeline_config(engine_config(pair, **options))
    )


@pytest.fixture
def pair(tiny_pair: Callable[[str], TinyPair], tmp_path: Path) -> TinyPair:
    """`llama_dflash_windowed` with a draft folder of its own: block 6, three taps, four layers."""
    sound = tiny_pair("llama_dflash_windowed")
    draft = shutil.copytree(sound.draft, tmp_path / "draft")
    return replace(sound, draft=draft)


def edit(pair: TinyPair, **changes: Any) -> None:
    """Changes the draft's config.json; `dflash` keys stand in `dflash_config`, None removes."""
    path = pair.draft / "config.json"
    config = json.loads(path.read_text())
    for found, wanted in ((config, changes), (config["dflash_config"], changes.pop("dflash", {}))):
        for name, value in wanted.items():
            found.pop(name, None)
            if value is not None:
                found[name] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("as_object", [False, True], ids=["dictionary", "object"])
@pytest.mark.parametrize(
    "config",
    [
        {"dflash_config": FIELDS},
        FIELDS,
        {**FIELDS, "mask_token_id": 1, "dflash_config": {"mask_token_id": 7}},
        {**FIELDS, "target_layer_ids": None, "aux_hidden_state_layer_ids": [1, 3]},
    ],
    ids=["nested", "top level", "nested first", "speculators"],
)
def test_spellings(config: dict[str, Any], as_object: bool) -> None:
    given = SimpleNamespace(**config) if as_object else config
    assert DflashDraftHFConfig.from_huggingface(given) == DflashDraftHFConfig(
        mask_token_id=7, target_layer_ids=[0, 2], block_size=6, num_target_layers=4
    )


def test_optional_fields_may_be_missing() -> None:
    found = DflashDraftHFConfig.from_huggingface({"mask_token_id": 7, "target_layer_ids": [1]})
    assert found == DflashDraftHFConfig(7, [1], None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask_token_id": None}, "mask_token_id is missing"),
        ({"target_layer_ids": None}, "target_layer_ids is missing"),
        ({"mask_token_id": "7"}, "mask_token_id '7' .*no integer"),
        ({"target_layer_ids": 3}, "target_layer_ids 3 .*no list of integers"),
        ({"target_layer_ids": [1.5]}, "target_layer_ids 1.5 .*no integer"),
        ({"block_size": True}, "block_size True .*no integer"),
        (
            {"target_layer_ids": None, "aux_hidden_state_layer_ids": [0, 2]},
            r"aux_hidden_state_layer_ids \[0, 2\] .*has 0",
        ),
    ],
)
def test_a_field_that_is_missing_or_wrong(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        DflashDraftHFConfig.from_huggingface({**FIELDS, **changes}, source="folder")


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"num_hidden_layers": 2}, [None, None]),
        ({"num_hidden_layers": 2, "sliding_window": 9}, [None, None]),
        (
            {
                "num_hidden_layers": 2,
                "sliding_window": 9,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            [None, 9],
        ),
    ],
)
def test_windows(config: dict[str, Any], windows: list[int | None]) -> None:
    assert layer_windows(config, source="folder") == windows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_types": ["full_attention"]}, "1 entries for 2 layers"),
        ({"layer_types": ["full_attention", "linear"]}, "'linear' of folder is not supported"),
        ({"sliding_window": None}, "sliding_window of folder is missing .*use_sliding_window"),
        ({"sliding_window": 0}, "sliding_window 0 of folder is no positive integer"),
        ({"dflash_config": {"use_swa": True}}, "use_swa True of folder is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 of folder is not"),
    ],
)
def test_windows_that_are_wrong(changes: dict[str, Any], said: str) -> None:
    config = {
        "num_hidden_layers": 2,
        "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    with pytest.raises(InputError, match=said):
        layer_windows({**config, **changes}, source="folder")


@pytest.mark.parametrize(
    ("keys", "causal"),
    [
        ({}, [False, True]),
        ({"is_causal": False}, [False, False]),
        ({"is_causal": True}, [True, True]),
        ({"dflash_config": {"causal": False}}, [False, False]),
        ({"dflash_config": {"causal": True}}, [True, True]),
        ({"is_causal": False, "dflash_config": {"causal": True}}, [False, False]),
        ({"sliding_window_non_causal": True}, [False, False]),
        ({"sliding_window_non_causal": False}, [False, True]),
        ({"is_causal": True, "sliding_window_non_causal": True}, [True, True]),
    ],
)
def test_keys_say_which_layers_are_causal(keys: dict[str, Any], causal: list[bool]) -> None:
    """As z-lab's code reads `is_causal`, vLLM's `causal`, and the `speculators` library its key."""
    layers = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
    assert layer_causality({**layers, **keys}, source="folder") == causal


@pytest.mark.parametrize("name", ["is_causal", "causal", "sliding_window_non_causal"])
def test_a_causality_that_is_no_boolean(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} 'no' of folder is no boolean"):
        layer_causality({"num_hidden_layers": 2, name: "no"}, source="folder")


@pytest.mark.parametrize("window", [5, 6])
def test_a_window_that_may_hide_a_part_of_the_block_both_ways(pair: TinyPair, window: int) -> None:
    edit(pair, sliding_window=window, is_causal=False)
    if window == 6:
        assert read_config(pair).causal == [False, False]
    else:
        with pytest.raises(InputError, match="sliding_window 5 is below the block_size 6"):
            read_config(pair)


def test_the_checkpoint_decides_the_block(pair: TinyPair) -> None:
    config = read_config(pair)
    assert config.block_size == config.resolve_block_size() == 6
    assert config.speculative_config.num_speculative_tokens == 5
    assert {params.num_draft_tokens for params in config.get_kv_params().children.values()} == {5}
    assert (config.target_layer_ids, config.mask_token_id) == ([3, 0, 1], 255)
    assert config.windows == [40, None]
    assert config.causal == [True, False]


def test_another_k_is_replaced_with_one_warning(
    pair: TinyPair, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        engine = Engine(engine_config(pair, num_speculative_tokens=3))
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "num_speculative_tokens 3 is replaced by 5" in warnings[0]
    assert engine.num_pages > 0


def test_another_k_is_replaced_in_any_configuration(
    pair: TinyPair, caplog: pytest.LogCaptureFixture
) -> None:
    """MAX says so where it reads the options itself; a configuration may be made otherwise."""
    config = make_pipeline_config(engine_config(pair))
    assert config.speculative is not None
    asked = config.speculative.model_copy(update={"num_speculative_tokens": 3})
    object.__setattr__(config, "speculative", asked)
    with caplog.at_level(logging.WARNING):
        read = UnifiedDflashLlama3Config.initialize(config)
    assert read.speculative_config.num_speculative_tokens == 5
    assert "num_speculative_tokens 3 is replaced by 5" in caplog.text


@pytest.mark.parametrize(
    ("name", "heads", "width"),
    [("llama_dflash_windowed", 1, 2 * 32), ("llama_dflash_agreeing", 4, 16)],
)
def test_windows_on_a_cpu_make_the_cache_one_wide_head(
    tiny_pair: Callable[[str], TinyPair], name: str, heads: int, width: int
) -> None:
    """The gather that stands in for a windowed kernel reads no other."""
    cache = read_config(tiny_pair(name)).get_kv_params().children["draft"]
    assert (cache.n_kv_heads, cache.head_dim) == (heads, width)


def test_the_model_class_reserves_room_for_the_block(pair: TinyPair) -> None:
    """As the configuration does, whatever K says."""
    config = make_pipeline_config(engine_config(pair))
    assert config.speculative is not None
    object.__setattr__(
        config, "speculative", config.speculative.model_copy(update={"num_speculative_tokens": 3})
    )
    expected = UnifiedDflashLlama3Config.initialize(config).get_kv_params().children["target"]
    found = UnifiedDflashLlama3Model.get_kv_params(
        config.model.huggingface_config,
        config,
        expected.devices,
        config.model.kv_cache,
        expected.dtype,
    )
    assert found == expected


def test_large_blocks(pair: TinyPair) -> None:
    edit(pair, block_size=16)
    assert read_config(pair).speculative_config.num_speculative_tokens == 15
    assert read_config(pair, num_speculative_tokens=15).block_size == 16
    edit(pair, block_size=None)
    assert read_config(pair, num_speculative_tokens=15).block_size == 16
    with pytest.raises(InputError, match="num_speculative_tokens is 32; choose 1 to 31"):
        read_config(pair, num_speculative_tokens=32)


@pytest.mark.parametrize("enabled", [True, False])
def test_prefix_caching_is_one_choice_for_both_caches(pair: TinyPair, enabled: bool) -> None:
    params = read_config(pair, enable_prefix_caching=enabled).get_kv_params()
    assert {child.enable_prefix_caching for child in params.children.values()} == {enabled}


def test_without_a_block_size_k_decides(pair: TinyPair) -> None:
    edit(pair, block_size=None)
    assert read_config(pair, num_speculative_tokens=3).block_size == 4
    with pytest.raises(InputError, match="no block_size; give --num-speculative-tokens"):
        read_config(pair)


def test_default_block_size(pair: TinyPair) -> None:
    """The checkpoint's own comes first, then the default, then K + 1."""
    config = read_config(pair)
    assert config.resolve_block_size(default=9) == 6
    silent = replace(config, block_size=0)
    assert silent.resolve_block_size(default=9) == 9
    assert silent.resolve_block_size() == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dflash": {"mask_token_id": 256}}, "mask_token_id 256 .*vocabulary of 256"),
        ({"dflash": {"mask_token_id": -1}}, "mask_token_id -1 .*vocabulary of 256"),
        ({"dflash": {"target_layer_ids": [3, 4]}}, "target_layer_ids has 4, .*layers 0 to 3"),
        ({"dflash": {"target_layer_ids": [-1]}}, "target_layer_ids has -1, .*layers 0 to 3"),
        ({"dflash": {"target_layer_ids": []}}, "target_layer_ids of .* is empty"),
        ({"block_size": 1}, "block_size is 1; choose 2 to 32"),
        ({"block_size": 33}, "block_size is 33; choose 2 to 32"),
        ({"num_target_layers": 5}, "target of 5 layers, this one has 4"),
        ({"hidden_size": 128}, "hidden_size 128 is not the target's 64"),
    ],
)
def test_a_draft_that_does_not_fit(pair: TinyPair, changes: dict[str, Any], said: str) -> None:
    edit(pair, **changes)
    with pytest.raises(InputError, match=said):
        Engine(engine_config(pair))


def test_a_draft_of_fewer_tokens_fits(pair: TinyPair) -> None:
    edit(pair, vocab_size=250, draft_vocab_size=None)
    assert read_config(pair).draft.vocab_size == 250


@pytest.mark.parametrize("spelling", ["top level", "speculators"])
def test_other_spellings_reach_the_engine(pair: TinyPair, spelling: str) -> None:
    fields = {"mask_token_id": 255, "target_layer_ids": [3, 0, 1]}
    if spelling == "speculators":
        del fields["target_layer_ids"]
        fields["aux_hidden_state_layer_ids"] = [4, 1, 2]
    edit(pair, dflash_config=None, **fields)
    config = read_config(pair)
    assert (config.target_layer_ids, config.mask_token_id) == ([3, 0, 1], 255)


def test_methods_do_not_disturb_each_other(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    """One target, three configurations in a row: MAX keeps its config for the process."""
    dflash = tiny_pair("llama_dflash_windowed")
    Engine(engine_config(dflash))
    Engine(
        EngineConfig(
            model=str(dflash.target),
            draft_model=str(tiny_eagle(tmp_path / "eagle", dflash.target, seed=1)),
            speculative_method="eagle",
            max_length=256,
        )
    )
    Engine(EngineConfig(model=str(dflash.target), max_length=256))
    Engine(engine_config(dflash))
