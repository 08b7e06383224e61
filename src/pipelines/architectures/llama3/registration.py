"""What every Llama 3 architecture tells MAX about itself."""

from __future__ import annotations

from typing import Any

from max.graph.weights import WeightsFormat
from max.pipelines.context import TextContext
from max.pipelines.kv_cache import PagedMemoryPlanner
from max.pipelines.lib import PipelineModel, SupportedArchitecture, TextTokenizer
from max.pipelines.modeling.types import PipelineTask

from .config import Llama3Config

__all__ = ["llama3_architecture"]


def llama3_architecture(
    name: str, model: type[PipelineModel[Any]], config: type[Any], **options: Any
) -> SupportedArchitecture:
    """An entry of MAX's registry for a Llama 3 that generates text on one device.

    Args:
        name: what MAX looks for: `LlamaForCausalLM` of a checkpoint's config.json with
            `_ModuleV3`, or what it renames it to for a speculative method.
        model: the pipeline model.
        config: its configuration.
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
        supported_encodings=Llama3Config.SUPPORTED_ENCODINGS,
        example_repo_ids=["HuggingFaceTB/SmolLM2-135M-Instruct"],
        memory_planner=PagedMemoryPlanner,
        supports_overlap_scheduler=False,
        supports_device_graph_capture=False,
        **options,
    )
