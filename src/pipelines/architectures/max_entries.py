"""The entries of MAX's registry, made of ours."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from max.graph.weights import WeightsFormat
from max.pipelines.context import TextContext
from max.pipelines.kv_cache import PagedMemoryPlanner
from max.pipelines.lib import PipelineModel, Speculator, SupportedArchitecture, TextTokenizer
from max.pipelines.modeling.types import PipelineTask
from max.pipelines.speculative import SpeculativeConfig

from unispec.methods import DRAFT_METHODS
from unispec.pipelines.targets.llama import LLAMA
from unispec.pipelines.targets.llama.config import Llama3Config
from unispec.pipelines.unified.compose import compose
from unispec.pipelines.unified.method import DraftMethod, trained_width
from unispec.pipelines.unified.target import TargetFamily

from .llama3_modulev3 import Llama3Model
from .registry import DOCUMENTED, methods_of, targets
from .unserved import UnservedPipeline

__all__ = ["for_commands", "for_engines", "target_entry"]

Entry = SupportedArchitecture | Speculator


@cache
def for_commands() -> list[Entry]:
    """What MAX's own commands find, always the same list.

    DeepSeek-V3 and Kimi K2.5 without a draft are not among them: MAX has its own.
    """
    alone = _entry("LlamaForCausalLM_ModuleV3", Llama3Model, Llama3Config, LLAMA)
    return [alone, *map(_documented, DOCUMENTED)]


@cache
def for_engines() -> list[Entry]:
    """What an engine lets MAX find: the targets of which MAX's own entries take no CPU."""
    others = [model for model in DOCUMENTED if model.family is not LLAMA]
    return [
        *(target_entry(family) for family in targets() if family is not LLAMA),
        *map(_documented, others),
    ]


@cache
def target_entry(family: TargetFamily) -> SupportedArchitecture:
    """The entry of a target; one that MAX does not rename for a draft stands for both."""
    return _entry(
        family.architecture,
        compose(family, None),
        family.config,
        family,
        checkpoint_draft_width=partial(_draft_width, methods_of(family)),
        pipeline_cls=UnservedPipeline,
    )


def _documented(model: type[Any]) -> Entry:
    """The entry of a documented pair, under the name that MAX gives a target with such a draft."""
    name = model.__name__.removesuffix("Model") + "ForCausalLM"
    if model.method.name not in DRAFT_METHODS:
        return Speculator(
            name=name,
            base=target_entry(model.family),
            draft_arch=None,
            method=model.method.name,
            pipeline_model=model,
            config=model.model_config_cls,
        )
    return _entry(
        name,
        model,
        model.model_config_cls,
        model.family,
        checkpoint_draft_width=partial(_draft_width, [model.method]),
        pipeline_cls=UnservedPipeline,
    )


def _entry(
    name: str,
    model: type[PipelineModel[Any]],
    config: type[Any],
    family: TargetFamily,
    **options: Any,
) -> SupportedArchitecture:
    """A model that generates text."""
    return SupportedArchitecture(
        name=name,
        pipeline_model=model,
        config=config,
        task=PipelineTask.TEXT_GENERATION,
        tokenizer=TextTokenizer,
        context_type=TextContext,
        default_weights_format=WeightsFormat.safetensors,
        default_encoding=family.config.DEFAULT_ENCODING,
        supported_encodings=family.config.SUPPORTED_ENCODINGS,
        example_repo_ids=[family.example_repo_id],
        memory_planner=PagedMemoryPlanner,
        supports_overlap_scheduler=False,
        supports_device_graph_capture=False,
        **options,
    )


def _draft_width(
    methods: Sequence[DraftMethod], speculative: SpeculativeConfig, target: Any, draft: Any
) -> int:
    """K of a draft that was trained for one; 0: as it is asked for."""
    for method in methods:
        if method.name == speculative.speculative_method and draft is not None:
            width = method.checkpoint_width(draft)
            return 0 if width is None else trained_width(width, speculative.num_speculative_tokens)
    return 0
