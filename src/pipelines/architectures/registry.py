"""Which pipeline model runs a configuration."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from max.pipelines.lib import PipelineConfig

from unispec.errors import InputError

if TYPE_CHECKING:
    from unispec.pipelines.runtime.model import UnifiedModel

__all__ = ["pipeline_model"]

# Model type and method, then module and class: an architecture imports the runtime that
# asks here, so it is imported only when it is wanted.
_MODELS: dict[tuple[str, str | None], tuple[str, str]] = {
    ("llama", None): ("llama3.target_only", "Llama3TargetModel"),
    ("llama", "dflash"): ("unified_dflash_llama3.model", "UnifiedDflashLlama3Model"),
    ("llama", "eagle"): ("unified_eagle_llama3.model", "UnifiedEagleLlama3Model"),
}


def pipeline_model(config: PipelineConfig) -> type[UnifiedModel]:
    """The class for the target's model type and the speculative method.

    Raises:
        InputError: nothing here runs this pair.
    """
    hf = config.model.huggingface_config
    # MAX renames `architectures` when a draft is configured, the model type stays.
    architecture = getattr(hf, "model_type", "unknown")
    method = config.speculative.speculative_method if config.speculative else None
    if (architecture, method) not in _MODELS:
        known = sorted(f"{name} with {way or 'no draft'}" for name, way in _MODELS)
        raise InputError(
            f"{architecture} with {method or 'no draft'} is not supported; supported:"
            f" {', '.join(known)}"
        )
    module, name = _MODELS[architecture, method]
    found: type[UnifiedModel] = getattr(import_module(f"{__package__}.{module}"), name)
    return found
