"""What every architecture here tells MAX about itself."""

from __future__ import annotations

from typing import Any

from max.graph.weights import WeightsFormat
from max.pipelines.context import TextContext
from max.pipelines.kv_cache import PagedMemoryPlanner
from max.pipelines.lib import PipelineModel, SupportedArchitecture, TextTokenizer
from max.pipelines.modeling.config_enums import SupportedEncoding
from max.pipelines.modeling.types import PipelineTask

from unispec.pipelines.targets.llama.config import Llama3Config

__all__ = ["text_architecture"]


def text_architecture(
    name: str,
    model: type[PipelineModel[Any]],
    config: type[Any],
    *,
    example_repo_id: str,
    supported_encodings: set[SupportedEncoding] = Llama3Config.SUPPORTED_ENCODINGS,
    **options: Any,
) -> SupportedArchitecture:
    """An entry of MAX's registry for a model that generates text on one device.

    Args:
        name: what MAX looks for: `LlamaForCausalLM` of a checkpoint's config.json with
            `_ModuleV3`, or what it renames it to for a speculative method.
        model: the pipeline model.
        config: its configuration.
        example_repo_id: a repository of the hub that it runs.
        supported_encodings: what MAX may choose or be asked for.
        options: further fields of the entry.
    """
    return SupportedArchitecture(
        name=name,
        pipeline_model=model,
        config=config,
        task=PipelineTask.TEXT_GENERATION,
        tokenizer=TextTokenizer,
        context_type=TextContext,
        default_weights_format=WeightsFormat.safetensors,
        default_encoding=Llama3Config.DEFAULT_ENCODING,
        supported_encodings=supported_encodings,
        example_repo_ids=[example_repo_id],
        memory_planner=PagedMemoryPlanner,
        supports_overlap_scheduler=False,
        supports_device_graph_capture=False,
        **options,
    )
