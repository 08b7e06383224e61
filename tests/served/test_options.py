"""What a server's options ask of the pipeline, and those that it cannot do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from max.pipelines.context import SamplingParams, TextContext
from max.pipelines.modeling.types import TextGenerationInputs
from numpy_graph import NumpyGraph, continuation
from scheduling import Scheduled, request
from tiny import TinyPair

from unispec.engine import EngineConfig
from unispec.engine.served_config import Served, served_pipeline
from unispec.errors import InputError
from unispec.pipelines.architectures.unified_eagle_llama3 import UnifiedEagleLlama3Model
from unispec.pipelines.runtime.thinking import ThinkingTokens
from unispec.pipelines.served.checks import check_server


@pytest.fixture
def config(tiny_pair: Callable[[str], TinyPair], monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    """Of a pair whose graph is computed in NumPy."""
    monkeypatch.setattr(UnifiedEagleLlama3Model, "load_model", lambda *_: NumpyGraph())
    pair = tiny_pair("llama_eagle")
    return EngineConfig(
        model=str(pair.target),
        draft_model=str(pair.draft),
        speculative_method="eagle",
        max_length=256,
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pipeline_role": "prefill_only"}, "pipeline_role is 'prefill_only'"),
        ({"enable_chunked_prefill": False}, "prompts are read in chunks"),
    ],
    ids=["role", "chunks"],
)
def test_what_would_break_a_step(config: EngineConfig, changes: dict[str, Any], text: str) -> None:
    made = served_pipeline(config).pipeline_config
    check_server(made)
    runtime = made.runtime.model_copy(update=changes)
    with pytest.raises(InputError, match=text):
        check_server(made.model_copy(update={"runtime": runtime}))


def test_adapters_are_refused(config: EngineConfig) -> None:
    made = served_pipeline(config).pipeline_config
    with_adapters = made.model_copy(update={"lora": SimpleNamespace(enable_lora=True)})
    with pytest.raises(InputError, match="LoRA adapters are not supported"):
        check_server(with_adapters)


def test_relaxed_acceptance_knows_thinking_blocks(config: EngineConfig) -> None:
    relaxed = replace(config, use_relaxed_acceptance_for_thinking=True, thinking_tokens=("a", "b"))
    served = served_pipeline(relaxed)
    vocabulary = served.tokenizer.delegate.get_vocab()
    assert served.factory().thinking == ThinkingTokens(vocabulary["a"], vocabulary["b"])
    assert served_pipeline(config).factory().thinking is None


def test_pages_are_as_many_as_asked_for(config: EngineConfig) -> None:
    pipeline = served_pipeline(replace(config, kv_cache_pages=33)).factory()
    assert pipeline.kv_manager.block_count().total == 33


def test_requests_give_way_where_pages_run_out(config: EngineConfig) -> None:
    """Three answers need two pages each and there are three: MAX's scheduler preempts by itself."""
    served = served_pipeline(replace(config, kv_cache_pages=3, max_batch_size=3))
    scheduled = Scheduled(served, served.factory())
    params = SamplingParams(temperature=0, max_new_tokens=200, ignore_eos=True)
    ids = {scheduled.add(scheduled.context([9, last], params)): last for last in (5, 6, 7)}
    scheduled.run()
    assert scheduled.scheduler.batch_constructor.total_preemption_count > 0
    for request_id, last in ids.items():
        assert scheduled.answer(request_id) == continuation(last, 200)
    scheduled.assert_left_empty()


def test_a_program_may_send_plain_contexts(config: EngineConfig) -> None:
    """As MAX's `generate` does, without a scheduler; a grammar is compiled in the step."""
    served = served_pipeline(config)
    scheduled = Scheduled(served, served.factory())
    params = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)
    made = scheduled.context([5, 6], params)
    plain = TextContext(
        **{name: getattr(made, name) for name in ("max_length", "tokens", "sampling_params")}
    )
    scheduled.add(plain)
    scheduled.run()
    assert len(scheduled.answer(plain.request_id)) == 4
    scheduled.assert_left_empty()


def test_a_grammar_without_a_scheduler_is_compiled_in_the_step(config: EngineConfig) -> None:
    served: Served = served_pipeline(config)
    pipeline = served.factory()
    asked = request([5, 6], SamplingParams(max_new_tokens=4))
    context = served.tokenizer.served_context(asked, [5, 6])
    context.grammar = "[0-9]+"
    manager = pipeline.kv_manager
    manager.claim(context, replica_idx=0)
    manager.alloc(context)
    pipeline.execute(TextGenerationInputs(batches=[[context]]))
    # The graph knows no masks, so the answer breaks the grammar and the step ends the request.
    assert context.is_done
    manager.release(context)
