"""The pipeline model: loads target and MTP layer and compiles the unified graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from max.driver import Buffer
from max.engine import InferenceSession, Model
from max.pipelines.lib import ModelInputs, UnifiedEagleOutputs

from unispec.errors import InputError
from unispec.pipelines.runtime.inputs import StepModelInputs

from ..deepseekV3.model import DeepseekV3Model
from ..deepseekV3.weights import cast_stack, target_state_dict
from ..mtp.weights import mtp_state_dict
from .config import UnifiedMTPDeepseekV3Config
from .graph import UnifiedMTPDeepseekV3, build_graph
from .inputs import UnifiedMTPDeepseekV3Inputs

__all__ = ["UnifiedMTPDeepseekV3Model"]


class UnifiedMTPDeepseekV3Model(DeepseekV3Model):
    """DeepSeek-V3 target and its MTP layer in one compiled graph; see `UnifiedModel`.

    Args:
        *args: as `UnifiedModel` takes them.
        **kwargs: likewise.

    Raises:
        InputError: devices that do not run it together, or a checkpoint that does not fit.
    """

    model_config_cls: ClassVar[type[Any]] = UnifiedMTPDeepseekV3Config
    """The class that reads `PipelineConfig`."""
    inputs_cls: ClassVar[type[StepModelInputs]] = UnifiedMTPDeepseekV3Inputs
    draft_reads_next_token = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def load_model(self, session: InferenceSession) -> Model:
        """Reads the checkpoint, builds the graph and compiles it with the session.

        Args:
            session: compiles and runs the graph.

        Raises:
            InputError: a tensor is missing, unknown, of another shape or not finite, of the
                MTP layer too.
        """
        config: UnifiedMTPDeepseekV3Config = self.arch_config
        tensors, source = self.read_tensors(config.target)
        target = target_state_dict(tensors, config.target, source=source)
        draft = mtp_state_dict(tensors, config.target, source=source)
        module = UnifiedMTPDeepseekV3(config)
        state = {f"target.{name}": value for name, value in target.items()}
        state |= {f"draft.{name}": value for name, value in draft.items()}
        module.load_state_dict(cast_stack(state, config.target.dtype), weight_alignment=1)
        self.connect_experts(session, config.target.ep)
        return self.compile(session, build_graph(config, module), module.state_dict())

    def execute(self, model_inputs: ModelInputs) -> UnifiedEagleOutputs:
        """Runs one step; a `pinned_bitmask` that is set decides which tokens are allowed.

        Args:
            model_inputs: a `UnifiedMTPDeepseekV3Inputs` with all that the graph takes.

        Returns:
            As `UnifiedModel.execute`.

        Raises:
            InputError: an input is missing, of another shape, or set though the graph does not
                take it.
        """
        assert isinstance(model_inputs, UnifiedMTPDeepseekV3Inputs)
        if model_inputs.pinned_bitmask is not None:
            packed = self._packed(model_inputs)
            model_inputs = replace(model_inputs, token_bitmask=packed, pinned_bitmask=None)
        return super().execute(model_inputs)

    def _packed(self, inputs: UnifiedMTPDeepseekV3Inputs) -> Buffer:
        """`pinned_bitmask` as int32 `[B, K + 1, ceil(V / 32)]` on the graph's device."""
        assert inputs.pinned_bitmask is not None
        assert inputs.draft_tokens is not None
        allowed = inputs.pinned_bitmask.to_numpy()
        rows, drafts = inputs.draft_tokens.shape
        expected = (rows, drafts + 1, self.arch_config.target.vocab_size)
        if allowed.shape != expected:
            raise InputError(
                f"pinned_bitmask has shape {list(allowed.shape)}, the step needs {list(expected)}:"
                " give [batch_size, num_speculative_tokens + 1, vocab_size]"
            )
        padding = [(0, 0), (0, 0), (0, -expected[2] % 32)]
        packed = np.packbits(np.pad(allowed.astype(bool), padding), axis=-1, bitorder="little")
        return Buffer.from_numpy(packed.view(np.int32)).to(self.devices[0])
