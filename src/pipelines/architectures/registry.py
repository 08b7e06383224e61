"""Which architectures there are, which one runs a configuration, what its draft's needs."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from unispec.errors import InputError
from unispec.methods import Method

if TYPE_CHECKING:
    from max.pipelines.lib import PipelineConfig, SupportedArchitecture

    from unispec.pipelines.runtime.model import UnifiedModel

__all__ = [
    "ENGINE_ARCHITECTURES",
    "architectures",
    "check_pair",
    "check_target",
    "complete_draft_config",
    "pipeline_model",
    "register",
]

# Packages with an `arch.py`.
_REGISTERED: Final = (
    "llama3_modulev3",
    "unified_dflash_kimi_k25",
    "unified_dflash_llama3",
    "unified_eagle_llama3",
    "unified_mtp_deepseekV3",
)

ENGINE_ARCHITECTURES: Final = [f"{__package__}.engine_entries"]
"""Modules whose `ARCHITECTURES` an engine lets MAX import: MAX's own entries refuse a CPU."""

# Model type, and the class of a checkpoint that writes text; others of the type rank or classify.
_CLASSES: Final = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k25": "KimiK25ForConditionalGeneration",
    "llama": "LlamaForCausalLM",
    # Llama's layers under another name.
    "mistral": "MistralForCausalLM",
}

# Model type and method, then module and class: an architecture imports the runtime that
# asks here, so it is imported only when it is wanted.
_MODELS: dict[tuple[str, str | None], tuple[str, str]] = {
    ("deepseek_v3", None): ("unispec.pipelines.targets.deepseek.model", "DeepseekV3Model"),
    ("deepseek_v3", "mtp"): (
        f"{__package__}.unified_mtp_deepseekV3.model",
        "UnifiedMTPDeepseekV3Model",
    ),
    ("kimi_k25", None): ("unispec.pipelines.targets.kimi.model", "KimiK2_5Model"),
    ("kimi_k25", "dflash"): (
        f"{__package__}.unified_dflash_kimi_k25.model",
        "UnifiedDflashKimiK25Model",
    ),
    ("llama", None): ("unispec.pipelines.targets.llama.target_only", "Llama3TargetModel"),
    ("llama", "dflash"): (
        f"{__package__}.unified_dflash_llama3.model",
        "UnifiedDflashLlama3Model",
    ),
    ("llama", "eagle"): (
        f"{__package__}.unified_eagle_llama3.model",
        "UnifiedEagleLlama3Model",
    ),
    ("mistral", None): ("unispec.pipelines.targets.llama.target_only", "Llama3TargetModel"),
    ("mistral", "dflash"): (
        f"{__package__}.unified_dflash_llama3.model",
        "UnifiedDflashLlama3Model",
    ),
    ("mistral", "eagle"): (
        f"{__package__}.unified_eagle_llama3.model",
        "UnifiedEagleLlama3Model",
    ),
}

# What other packages brought, by the same pairs.
_ADDED: dict[tuple[str, str | None], type[UnifiedModel]] = {}

# Method, then module and function; the other methods' drafts need nothing.
_DRAFT_CONFIGS: dict[str, tuple[str, str]] = {
    "dflash": ("unispec.pipelines.drafts.dflash.config", "complete_draft_config"),
}


@cache
def architectures() -> list[SupportedArchitecture]:
    """The entries for MAX's registry, always the same list."""
    return [import_module(f"{__package__}.{name}.arch").ARCHITECTURE for name in _REGISTERED]


def check_pair(model_type: Any, method: str | None, *, source: str) -> None:
    """Refuses a pair that nothing here runs; needs no more of a model than its type.

    Args:
        model_type: `model_type` of the target's config.json, whatever stands there.
        method: the speculative method; None: the target alone.
        source: the target's file or folder, for the error.

    Raises:
        InputError: nothing here runs this pair.
    """
    pairs = [*_MODELS, *_ADDED]
    if (model_type, method) in pairs:
        return
    known = sorted(f"{name} with {way or 'no draft'}" for name, way in pairs)
    raise InputError(
        f"{source}: model_type {model_type} with {method or 'no draft'} is not supported;"
        f" supported: {', '.join(known)}"
    )


def check_target(hf: Any, *, source: str) -> None:
    """Refuses a checkpoint of a supported type that does not write text, or is a draft.

    Args:
        hf: the target's Hugging Face config.
        source: the file or folder, for the error.

    Raises:
        InputError: `architectures` names another class than this type's language model.
    """
    stated, needed = hf.architectures[0], _CLASSES.get(hf.model_type)
    if needed not in (None, stated):
        raise InputError(
            f"{source} is a {stated}, and a target of model_type {hf.model_type} is a {needed}; use"
            " a model that writes text, and give a draft by --draft-model-path"
        )


def complete_draft_config(method: str, draft: Any, asked: int | None, *, source: str) -> None:
    """Brings a draft's Hugging Face config into the form that MAX reads.

    Args:
        method: the speculative method.
        draft: the config, changed in place.
        asked: K that was asked for, if any.
        source: the file or folder, for the errors.

    Raises:
        InputError: a field of this method is missing or wrong.
    """
    if method in _DRAFT_CONFIGS:
        module, name = _DRAFT_CONFIGS[method]
        getattr(import_module(module), name)(draft, asked, source=source)


def pipeline_model(config: PipelineConfig) -> type[UnifiedModel]:
    """The class for the target's model type and the speculative method.

    Raises:
        InputError: nothing here runs this pair.
    """
    hf = config.model.huggingface_config
    # MAX renames `architectures` when a draft is configured, the model type stays.
    model_type = getattr(hf, "model_type", "unknown")
    method = config.speculative.speculative_method if config.speculative else None
    check_pair(model_type, method, source=config.model.model_name)
    if (model_type, method) in _ADDED:
        return _ADDED[model_type, method]
    module, name = _MODELS[model_type, method]
    found: type[UnifiedModel] = getattr(import_module(module), name)
    return found


def register(model_type: str, method: Method | None, model: type[UnifiedModel]) -> None:
    """Lets the engines of this process run one more pair of target and method.

    Args:
        model_type: `model_type` of the target's config.json.
        method: the speculative method; None: the target alone.
        model: the pipeline model.

    Raises:
        InputError: another class runs this pair already.
    """
    pair = (model_type, method)
    if pair in _MODELS or _ADDED.get(pair, model) is not model:
        raise InputError(
            f"{model_type} with {method or 'no draft'} has an architecture already; choose another"
            " model type or method"
        )
    _ADDED[pair] = model
