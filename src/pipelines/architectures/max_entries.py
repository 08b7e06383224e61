"""The entries of MAX's registry, made of ours."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any, Final

from max.graph.weights import WeightsFormat
from max.pipelines.context import TextContext
from max.pipelines.kv_cache import PagedMemoryPlanner
from max.pipelines.lib import PipelineModel, Speculator, SupportedArchitecture, TextTokenizer
from max.pipelines.modeling.types import PipelineTask
from max.pipelines.speculative import SpeculativeConfig

from unispec.methods import DRAFT_METHODS, FACTS
from unispec.pipelines.served.context import ServedContext
from unispec.pipelines.served.memory import ServedMemoryPlanner
from unispec.pipelines.served.pipeline import ServedPipeline
from unispec.pipelines.served.tokenizer import ServedTokenizer
from unispec.pipelines.targets.llama import LLAMA
from unispec.pipelines.targets.llama.config import Llama3Config
from unispec.pipelines.unified.method import DraftMethod, trained_width
from unispec.pipelines.unified.model import UnifiedModel
from unispec.pipelines.unified.target import TargetFamily

from .llama3_modulev3 import Llama3Model
from .registry import DOCUMENTED, Pair, pairs, targets

__all__ = ["for_commands", "for_engines", "pair_entry", "target_entry"]

Entry = SupportedArchitecture | Speculator

_RENAMED_DRAFTS: Final[Mapping[str, str]] = {
    "dflash": "LlamaForCausalLM",
    "eagle": "LlamaForCausalLMEagle",
    "eagle3": "LlamaForCausalLMEagle3",
}
"""What MAX makes of the class that a method's drafts name in config.json."""


@cache
def for_commands() -> list[Entry]:
    """What MAX's own commands find, always the same list.

    Targets without a draft are not among them, but for the Llama on the ModuleV3 API: MAX has its
    own. MAX renames two targets for a draft, and the documented pairs stand under those names.
    """
    alone = _entry("LlamaForCausalLM_ModuleV3", Llama3Model, Llama3Config, LLAMA)
    own = [_documented(model) for model in DOCUMENTED]
    named = {Pair(model.family, model.method) for model in DOCUMENTED}
    # Of these MAX finds no speculator; the documented pair serves later generations too.
    renamed = {model.family for model in DOCUMENTED if _has_checkpoint(model.method)}
    others = [pair for pair in _with_draft() if Pair(*pair) not in named and pair[0] not in renamed]
    return [alone, *own, *(pair_entry(*pair) for pair in others)]


@cache
def for_engines() -> list[Entry]:
    """What engines and our server let MAX find: each target alone, and its pairs.

    MAX renames no target that has pairs of its own.
    """
    return [*map(target_entry, targets()), *(pair_entry(*pair) for pair in _with_draft())]


@cache
def target_entry(family: TargetFamily) -> SupportedArchitecture:
    """The entry of a target alone, on which those of its pairs are based."""
    return _served(family.architecture, Pair(family, None))


@cache
def pair_entry(family: TargetFamily, method: DraftMethod) -> Speculator:
    """The entry of a target with a draft: MAX finds it by target, method and kind of draft."""
    pair = Pair(family, method)
    max_method = FACTS[method.name].max_method
    assert max_method is not None, "MAX knows each method that has a draft"
    return Speculator(
        name=_name(pair.model),
        base=target_entry(family),
        draft_arch=_RENAMED_DRAFTS.get(method.name),
        method=max_method,
        pipeline_model=pair.model,
        config=pair.model.model_config_cls,
        checkpoint_draft_width=partial(_draft_width, method),
    )


def _with_draft() -> list[tuple[TargetFamily, DraftMethod]]:
    return [(family, method) for family, method in pairs() if method is not None]


def _documented(model: type[UnifiedModel]) -> Entry:
    """The entry of a documented pair; one with a draft checkpoint has a target that MAX renames."""
    assert model.method is not None
    if not _has_checkpoint(model.method):
        return pair_entry(model.family, model.method)
    return _served(
        _name(model),
        Pair(model.family, model.method),
        checkpoint_draft_width=partial(_draft_width, model.method),
    )


def _has_checkpoint(method: DraftMethod | None) -> bool:
    return method is not None and method.name in DRAFT_METHODS


def _name(model: type[UnifiedModel]) -> str:
    return model.__name__.removesuffix("Model") + "ForCausalLM"


def _served(name: str, pair: Pair, **options: Any) -> SupportedArchitecture:
    """A pair whose graph our own pipeline drives, on any device."""
    config: Any = pair.model.model_config_cls
    return _entry(
        name,
        pair.model,
        config,
        pair.family,
        tokenizer=ServedTokenizer,
        context_type=ServedContext,
        memory_planner=ServedMemoryPlanner,
        pipeline_cls=ServedPipeline,
        # A step has room for so many tokens of prompts.
        required_arguments={"enable_chunked_prefill": True},
        supports_spec_decode_mixed_batches=True,
        **options,
    )


def _entry(
    name: str,
    model: type[PipelineModel[Any]],
    config: type[Any],
    family: TargetFamily,
    **options: Any,
) -> SupportedArchitecture:
    """A model that generates text."""
    usual: dict[str, Any] = {
        "tokenizer": TextTokenizer,
        "context_type": TextContext,
        "memory_planner": PagedMemoryPlanner,
    }
    return SupportedArchitecture(
        name=name,
        pipeline_model=model,
        config=config,
        task=PipelineTask.TEXT_GENERATION,
        default_weights_format=WeightsFormat.safetensors,
        default_encoding=family.config.DEFAULT_ENCODING,
        supported_encodings=family.config.SUPPORTED_ENCODINGS,
        example_repo_ids=[family.example_repo_id],
        supports_overlap_scheduler=False,
        supports_device_graph_capture=False,
        **{**usual, **options},
    )


def _draft_width(
    method: DraftMethod, speculative: SpeculativeConfig, target: Any, draft: Any
) -> int:
    """K of a draft that was trained for one; 0: as it is asked for."""
    width = None if draft is None else method.checkpoint_width(draft)
    return 0 if width is None else trained_width(width, speculative.num_speculative_tokens)
