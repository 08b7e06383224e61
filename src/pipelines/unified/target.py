"""What a target is to the composer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from max.graph import BufferType, TensorType
from max.nn import Module
from max.pipelines.lib import MAXModelConfig

from unispec.checkpoints import Weight

from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from .model import UnifiedModel

__all__ = ["ExtraTypes", "TargetFamily"]

ExtraTypes = Mapping[str, Sequence[TensorType | BufferType]]
"""Types of graph inputs by name."""


@dataclass(frozen=True, kw_only=True)
class TargetFamily:
    """A kind of target: how its checkpoint is read, and what computes it."""

    name: str
    """Part of the names of graphs; targets with the same stack share it."""
    model_type: str
    """Of its checkpoints' config.json."""
    architecture: str
    """The class in `architectures` of a checkpoint that writes text; others rank or classify."""
    config: type[Any]
    """Reads the stack from MAX's `PipelineConfig`: `initialize`, `construct_kv_params`,
    `calculate_max_seq_len`, `choose_encoding`, `number_bytes` and `KEEPS_FORMS`, as
    `Llama3Config` has them."""
    read: Callable[[MAXModelConfig, Any], Checkpoint]
    """The checkpoint's tensors as the stack takes them, given model and stack configuration."""
    state: Callable[..., Mapping[str, Weight]]
    """`(tensors, stack, *, source)` to the stack's weights by name, checked."""
    stack: Callable[..., Module]
    """`(stack configuration, *, tapped_layers)` to a module whose `at(step)` is the target in one
    step; it has `embed_tokens` and `lm_head`, which drafts share."""
    example_repo_id: str
    """A repository of the hub that it runs."""
    model: type[UnifiedModel]
    """The pipeline model; one that brings more to a step on the host derives from it."""
    extra_types: Callable[[Any], ExtraTypes] = lambda stack: {}
    """Types of the inputs that only this target has, given the stack's configuration."""
