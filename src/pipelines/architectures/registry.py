"""Which targets and draft methods there are, and which of them run together."""

from __future__ import annotations

from typing import Any, Final, NamedTuple, cast

from max.pipelines.lib import PIPELINE_REGISTRY, PipelineConfig

from unispec.errors import InputError
from unispec.methods import FACTS, Method, method_of_architecture
from unispec.pipelines.drafts.dflash.method import DFLASH
from unispec.pipelines.drafts.eagle.method import EAGLE
from unispec.pipelines.drafts.eagle3.method import EAGLE3
from unispec.pipelines.drafts.mtp.method import MTP
from unispec.pipelines.targets.deepseek import DEEPSEEK_V3
from unispec.pipelines.targets.kimi import KIMI_K25
from unispec.pipelines.targets.llama import LLAMA
from unispec.pipelines.targets.llama.granite import GRANITE
from unispec.pipelines.targets.llama.mistral import MINISTRAL, MISTRAL
from unispec.pipelines.targets.llama.qwen2 import QWEN2
from unispec.pipelines.targets.llama.qwen3 import QWEN3
from unispec.pipelines.unified.compose import compose
from unispec.pipelines.unified.method import DraftMethod
from unispec.pipelines.unified.model import UnifiedModel
from unispec.pipelines.unified.target import TargetFamily

from .unified_dflash_kimi_k25 import UnifiedDflashKimiK25Model
from .unified_dflash_llama3 import UnifiedDflashLlama3Model
from .unified_eagle_llama3 import UnifiedEagleLlama3Model
from .unified_mtp_deepseekV3 import UnifiedMTPDeepseekV3Model

__all__ = [
    "DOCUMENTED",
    "ENGINE_ARCHITECTURES",
    "Pair",
    "check_target",
    "find",
    "methods_of",
    "pairs",
    "pipeline_model",
    "register",
    "targets",
]


class Pair(NamedTuple):
    """A target, and how its drafts are proposed."""

    family: TargetFamily
    """The target."""
    method: DraftMethod | None
    """The draft method; None: the target alone."""

    @property
    def model(self) -> type[UnifiedModel]:
        """The pipeline model: the documented class, or one that is composed."""
        found = (m for m in DOCUMENTED if m.family is self.family and m.method is self.method)
        return next(found, None) or _composed(self.family, self.method)


def _composed(family: TargetFamily, method: DraftMethod | None) -> type[UnifiedModel]:
    """A composed class, in the module where pickle finds it in any process."""
    model = compose(family, method)
    model.__module__ = f"{__package__}.composed"
    return model


DOCUMENTED: Final[tuple[type[UnifiedModel], ...]] = (
    UnifiedDflashKimiK25Model,
    UnifiedDflashLlama3Model,
    UnifiedEagleLlama3Model,
    UnifiedMTPDeepseekV3Model,
)
"""The classes of pairs that have a package of their own; others are composed."""

ENGINE_ARCHITECTURES: Final = [f"{__package__}.engine_entries"]
"""Modules whose `ARCHITECTURES` an engine, or our server, lets MAX import."""

_RUN: Final[dict[TargetFamily, tuple[DraftMethod, ...]]] = {
    DEEPSEEK_V3: (MTP,),
    GRANITE: (EAGLE, EAGLE3, DFLASH),
    KIMI_K25: (DFLASH,),
    LLAMA: (EAGLE, EAGLE3, DFLASH),
    MINISTRAL: (EAGLE, EAGLE3, DFLASH),
    MISTRAL: (EAGLE, EAGLE3, DFLASH),
    QWEN2: (EAGLE, EAGLE3, DFLASH),
    QWEN3: (EAGLE, EAGLE3, DFLASH),
}
"""Every target, which also runs alone, and the methods that draft for it."""


def targets() -> list[TargetFamily]:
    """Every target."""
    return list(_RUN)


def methods_of(family: TargetFamily) -> tuple[DraftMethod, ...]:
    """The methods that draft for a target."""
    return _RUN[family]


def pairs() -> list[Pair]:
    """All that run, targets alone first."""
    alone = [Pair(family, None) for family in _RUN]
    return alone + [Pair(family, m) for family, methods in _RUN.items() for m in methods]


def find(model_type: Any, method: str | None, *, source: str) -> Pair:
    """The pair of a target's `model_type` and a speculative method.

    Args:
        model_type: of the target's config.json, whatever stands there.
        method: the speculative method; None: the target alone.

    Raises:
        InputError: nothing here runs this pair.
    """
    for pair in pairs():
        name = None if pair.method is None else pair.method.name
        if (pair.family.model_type, name) == (model_type, method):
            return pair
    known = [
        f"{family.model_type} with {', '.join(m.name for m in methods)} or no draft"
        for family, methods in _RUN.items()
    ]
    raise InputError(
        f"{source}: model_type {model_type} with {method or 'no draft'} is not supported;"
        f" supported: {', '.join(known)}"
    )


def check_target(family: TargetFamily, hf: Any, *, source: str) -> None:
    """Refuses a checkpoint of a supported type that does not write text, or is a draft.

    Raises:
        InputError: `architectures` names another class than this type's language model.
    """
    stated, needed = hf.architectures[0], family.architecture
    if needed != stated:
        raise InputError(
            f"{source} is a {stated}, and a target of model_type {hf.model_type} is a {needed}; use"
            " a model that writes text, and give a draft by --draft-model-path"
        )


def pipeline_model(config: PipelineConfig) -> type[UnifiedModel]:
    """The class for the target's model type and the draft.

    Args:
        config: as an engine makes it; the class that its draft names is the method's.

    Raises:
        InputError: nothing here runs this pair.
    """
    # MAX renames `architectures` when a draft is configured, the model type stays.
    model_type = getattr(config.model.huggingface_config, "model_type", None)
    return find(model_type, _method(config), source=config.model.model_name).model


def _method(config: PipelineConfig) -> str | None:
    """The method, which generations of one name share for MAX."""
    if config.speculative is None:
        return None
    method, draft = config.speculative.speculative_method, config.draft_model
    if method is None or draft is None:
        return method
    # MAX knows others, which `find` refuses.
    known = cast("Method", method)
    return method_of_architecture(known, draft.huggingface_config.architectures or ())


def register(family: TargetFamily, *methods: DraftMethod) -> None:
    """Lets the engines of this process run one more target, or draft for one by more methods.

    Args:
        methods: that draft for it; without any it runs alone.

    Raises:
        InputError: another target has this `model_type` or `architecture`, or another method of it
            this name, or the name has no facts.
    """
    from .max_entries import pair_entry, target_entry

    known = _RUN.get(family, ())
    for target in _RUN:
        same = {target.model_type, target.architecture} & {family.model_type, family.architecture}
        if target is not family and same:
            raise InputError(f"{' and '.join(sorted(same))} has a target already; choose another")
    added = [method for method in methods if method not in known]
    names = [method.name for method in (*known, *added)]
    for name in names:
        if name not in FACTS:
            raise InputError(
                f"method {name!r} has no facts in unispec.methods; known: {', '.join(FACTS)}"
            )
        if names.count(name) > 1:
            raise InputError(
                f"{family.model_type} has a method {name!r} already; register one of them, or"
                " another target"
            )
    is_new = family not in _RUN
    _RUN[family] = (*known, *added)
    if is_new:
        # MAX finds a target by its class, and may have one of that name for GPUs only.
        PIPELINE_REGISTRY.register(target_entry(family), allow_override=True)
    for method in added:
        PIPELINE_REGISTRY.register(pair_entry(family, method))
