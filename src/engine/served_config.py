"""An engine's configuration as MAX's server takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from max.nn.kv_cache import KVCacheParamInterface
from max.pipelines.lib import PIPELINE_REGISTRY, MemoryPlan, PipelineConfig

from unispec.kv_cache.manager import with_room
from unispec.pipelines.runtime.speculating import SpeculationOptions
from unispec.pipelines.served.pages import longest_row, with_pages
from unispec.pipelines.served.pipeline import ServedPipeline
from unispec.pipelines.served.tokenizer import ServedTokenizer

from .cache_pages import count_pages
from .config import EngineConfig
from .pipeline_config import make_pipeline_config, weight_encodings

__all__ = ["Served", "served_pipeline"]


@dataclass(frozen=True)
class Served:
    """What MAX's server needs of a model; all of it can be pickled."""

    factory: Callable[[], ServedPipeline]
    """Builds the pipeline, in the process that runs the steps."""
    tokenizer: ServedTokenizer
    """Makes and checks requests, in the API process."""
    memory_plan: MemoryPlan
    """Rows and length, and memory for the pages of an engine."""
    pipeline_config: PipelineConfig
    """With structured output, on a CPU too, and decode rows before prefill chunks."""


def served_pipeline(config: EngineConfig) -> Served:
    """Reads configuration and tokenizer; `factory` reads the weights and compiles the graph.

    Rows, steps and cache pages are those of an `Engine` of the same configuration.

    Raises:
        InputError: what `Engine` refuses of a configuration.
    """
    made = make_pipeline_config(config)
    # MAX refuses structured output on a CPU, where only its own sampler lacks it.
    sampling = made.sampling.model_copy(update={"enable_structured_output": True})
    runtime = made.runtime.model_copy(update={"enable_in_flight_batching": True})
    made = made.model_copy(update={"sampling": sampling, "runtime": runtime})
    found = PIPELINE_REGISTRY.retrieve_factory(made)
    factory = cast("partial[ServedPipeline]", found.factory)
    tokenizer = cast("ServedTokenizer", found.tokenizer)
    model = factory.keywords["pipeline_model"]
    length = model.calculate_max_seq_len(made, made.model.huggingface_config)
    params = with_room(
        model.model_config_cls.initialize(made, max_seq_len=length).get_kv_params(),
        config.num_looked_up,
    )
    pages = count_pages(config, params, length)
    # MAX bounds the length by the draft's own, too, and by the free memory of this moment.
    plan = with_pages(params, replace(found.memory_plan, planned_max_length=length), pages)
    tokenizer.max_length = length
    tokenizer.longest_in_cache = longest_row(params, pages)
    tokenizer.thinking_tokens = config.thinking_tokens
    return Served(
        factory=partial(
            factory,
            memory_plan=plan,
            encodings=weight_encodings(config),
            num_looked_up=config.num_looked_up,
            speculation=_speculation(config, params),
            compiled=config.compiled,
            captures_steps=config.device_graph_capture,
        ),
        tokenizer=tokenizer,
        memory_plan=plan,
        pipeline_config=made,
    )


def _speculation(config: EngineConfig, params: KVCacheParamInterface) -> SpeculationOptions | None:
    """What an engine of this configuration does; None without a speculative method."""
    if config.speculative_method is None:
        return None
    return SpeculationOptions(config.loaded_count(params.num_draft_tokens), config.lookup)
