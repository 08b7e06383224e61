"""The pipeline model of any target with any draft method."""

from __future__ import annotations

from functools import cache

from .method import DraftMethod
from .model import UnifiedModel
from .target import TargetFamily

__all__ = ["compose"]


@cache
def compose(family: TargetFamily, method: DraftMethod | None) -> type[UnifiedModel]:
    """The class that loads and runs a pair, always the same one.

    Args:
        method: the draft method; None: the target alone.
    """
    config = family.config
    name = family.architecture.removesuffix("ForCausalLM")
    if method is not None:
        name += method.name.title()
        config = type(f"{name}Config", (method.config,), {"__module__": __name__, "family": family})
    return type(
        f"{name}Model",
        (family.model,),
        {
            "__module__": __name__,
            "__doc__": f"A {family.model_type} target and its draft, if it has one.",
            "family": family,
            "method": method,
            "model_config_cls": config,
        },
    )
