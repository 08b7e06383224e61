"""The memory plan against numbers computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from max.pipelines.lib import PIPELINE_REGISTRY, PipelineConfig
from tiny import TinyPair
from tiny.checkpoint import read

from unispec.engine import Engine, EngineConfig
from unispec.engine.pipeline_config import make_pipeline_config
from unispec.engine.served_config import served_pipeline
from unispec.errors import InputError
from unispec.kv_cache.manager import pages_per_row
from unispec.pipelines.served.memory import ServedMemoryPlanner
from unispec.pipelines.served.pages import longest_row, planned_pages, with_pages

PAGE = 128


def config_of(pair: TinyPair, **options: Any) -> EngineConfig:
    return EngineConfig(
        model=str(pair.target),
        draft_model=None if pair.draft is None else str(pair.draft),
        speculative_method=pair.method,
        draft_proposal=pair.draft_proposal,
        max_length=300,
        **options,
    )


def planner(config: PipelineConfig) -> ServedMemoryPlanner:
    architecture = PIPELINE_REGISTRY.architecture_for_config(config)
    assert architecture is not None
    assert architecture.memory_planner is ServedMemoryPlanner
    return ServedMemoryPlanner(architecture.config.initialize(config, max_seq_len=300))


def numbers(folder: Path) -> int:
    return sum(tensor.size for tensor in read(folder)[1].values())


def test_weights_are_those_of_both_as_they_are_stored(
    tiny_pair: Callable[[str], TinyPair],
) -> None:
    """This pair's files are in bfloat16, in which a CPU keeps matrices."""
    pair = tiny_pair("llama_eagle_bfloat16")
    assert pair.draft is not None
    made = make_pipeline_config(config_of(pair))
    stored = sum(file.stat().st_size for file in made.model.weight_path)
    assert stored < 2.2 * numbers(pair.target)
    tensors = [one for folder in (pair.target, pair.draft) for one in read(folder)[1].values()]
    # Norms are computed with in float32.
    expected = sum((2 if tensor.ndim == 2 else 4) * tensor.size for tensor in tensors)
    # Which tokens the draft proposes is said by 64-bit integers.
    assert planner(made).estimate_weights_size(made) == expected + 4 * 128


def test_sampling_needs_planes_as_wide_as_the_vocabulary(
    tiny_pair: Callable[[str], TinyPair],
) -> None:
    made = make_pipeline_config(
        config_of(tiny_pair("llama_eagle_agreeing"), num_speculative_tokens=3, max_batch_size=5)
    )
    # 5 rows of 256 counts and 256 biases, and 4 masks of 8 words; 64 features of 64 numbers.
    by_hand = 5 * (256 * 4 + 256 * 4 + 4 * 8 * 4 + 64 * 64 * 4)
    found = planner(made).estimate_activation_memory(made, made.model.huggingface_config)
    assert found == by_hand == 92_800


def test_sampled_drafts_have_distributions(tiny_pair: Callable[[str], TinyPair]) -> None:
    pair = tiny_pair("llama_eagle_biased")
    made = make_pipeline_config(config_of(pair, num_speculative_tokens=2, max_batch_size=3))
    # 3 rows, V = 320, K = 2: planes, 3 masks of 10 words, distributions of 2 drafts in and out,
    # and 64 features of 96 numbers.
    by_hand = 3 * (2 * 320 * 4 + 3 * 10 * 4 + 2 * 2 * 320 * 4 + 64 * 96 * 4)
    found = planner(made).estimate_activation_memory(made, made.model.huggingface_config)
    assert found == by_hand == 97_128


@pytest.mark.parametrize("options", [{}, {"kv_cache_pages": 7}, {"kv_cache_pages": 90}])
def test_a_server_has_the_pages_of_an_engine(
    tiny_pair: Callable[[str], TinyPair], options: dict[str, Any]
) -> None:
    config = config_of(tiny_pair("llama_eagle_agreeing"), max_batch_size=4, **options)
    served, engine = served_pipeline(config), Engine(config)
    params = engine._kv_params
    assert planned_pages(params, served.memory_plan, exact=True) == engine.num_pages
    assert served.memory_plan.planned_max_length == served.tokenizer.max_length == 300
    assert served.memory_plan.planned_max_batch_size == 4


def test_a_row_that_never_fits_is_refused(tiny_pair: Callable[[str], TinyPair]) -> None:
    """MAX's scheduler would end with an error at the request that grows so long."""
    served = served_pipeline(config_of(tiny_pair("llama_eagle_agreeing"), kv_cache_pages=2))
    model = served.factory.keywords["pipeline_model"]  # type: ignore[attr-defined]
    config = model.model_config_cls.initialize(served.pipeline_config, max_seq_len=300)
    params = config.get_kv_params()
    assert planned_pages(params, served.memory_plan, exact=True) == 2
    with pytest.raises(InputError, match="holds 2 pages, and one request of up to 300 tokens"):
        planned_pages(params, served.memory_plan, exact=False)


def test_a_plan_with_more_memory_gives_what_all_rows_can_fill(
    tiny_pair: Callable[[str], TinyPair],
) -> None:
    """4 rows of 300 tokens and 2 * 8 + 1 more have 3 pages each."""
    served = served_pipeline(config_of(tiny_pair("llama_eagle_agreeing"), max_batch_size=4))
    params = Engine(config_of(tiny_pair("llama_eagle_agreeing")))._kv_params
    assert planned_pages(params, with_pages(params, served.memory_plan, 50), exact=False) == 12


def test_the_longest_row_fits_and_one_token_more_does_not(
    tiny_pair: Callable[[str], TinyPair],
) -> None:
    params = Engine(config_of(tiny_pair("llama_eagle_agreeing")))._kv_params
    longest = longest_row(params, 3)
    assert pages_per_row(params, longest) == 3
    assert pages_per_row(params, longest + 1) == 4
    # Where steps choose K it may be 8.
    assert longest == 3 * PAGE - 2 * 8 - 1
