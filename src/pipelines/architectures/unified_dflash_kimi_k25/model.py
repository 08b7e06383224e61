"""The pipeline model: loads target, vision tower and draft and compiles both graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from max.engine import InferenceSession, Model
from max.graph import Module as CompilationUnit

from unispec.pipelines.drafts.copies import check_copies
from unispec.pipelines.drafts.dflash.weights import dflash_state_dict
from unispec.pipelines.drafts.weights import unified_state_dict
from unispec.pipelines.runtime.inputs import StepModelInputs
from unispec.pipelines.runtime.weights import read_weights
from unispec.pipelines.targets.deepseek.weights import cast_stack
from unispec.pipelines.targets.kimi.model import KimiK2_5Model

from .config import UnifiedDflashKimiK25Config
from .graph import UnifiedDflashKimiK25, build_graph
from .inputs import UnifiedDflashKimiK25Inputs

__all__ = ["UnifiedDflashKimiK25Model"]


class UnifiedDflashKimiK25Model(KimiK2_5Model):
    """Kimi K2.5 target and DFlash draft in one compiled graph; see `UnifiedModel`.

    Args:
        *args: as `UnifiedModel` takes them.
        **kwargs: likewise.

    Raises:
        InputError: more than one device, or a checkpoint that does not fit.
    """

    model_config_cls: ClassVar[type[Any]] = UnifiedDflashKimiK25Config
    """The class that reads `PipelineConfig`."""
    inputs_cls: ClassVar[type[StepModelInputs]] = UnifiedDflashKimiK25Inputs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def load_model(self, session: InferenceSession) -> tuple[Model, Model]:  # type: ignore[override]
        """Reads the checkpoints, builds both graphs and compiles them with the session.

        Args:
            session: compiles and runs the graphs.

        Returns:
            The vision graph, then the unified language graph.

        Raises:
            InputError: a tensor is missing, unknown, of another shape or not finite.
        """
        config: UnifiedDflashKimiK25Config = self.arch_config
        draft_model = self.pipeline_config.draft_model
        assert config.vision is not None
        assert draft_model is not None
        tensors, target = self.read_language(config.target)
        vision = self.read_vision(tensors, config.vision)
        tensors, source = read_weights(draft_model)
        check_copies(tensors, target, source=source)
        draft = dflash_state_dict(
            tensors,
            draft_model.huggingface_config,
            config.target,
            num_taps=len(config.target_layer_ids),
            source=source,
        )
        stack = replace(config.draft, vocab_size=draft.num_proposed(config.target.vocab_size))
        config = replace(config, draft=stack)
        module = UnifiedDflashKimiK25(config)
        dtype = config.target.dtype
        state = unified_state_dict(target, draft, dtype)
        # Again for the target, whose routers keep float32.
        state |= cast_stack({f"target.{name}": tensor for name, tensor in target.items()}, dtype)
        module.load_state_dict(state, weight_alignment=1)
        unit = CompilationUnit()
        build_graph(config, module, unit)
        return self.compile_with_vision(session, unit, module, vision)
