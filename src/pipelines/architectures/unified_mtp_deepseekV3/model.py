"""The pipeline model: DeepSeek-V3 target and its MTP layer in one compiled graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from max.driver import Buffer
from max.engine import InferenceSession
from max.pipelines.lib import ModelInputs

from unispec.errors import InputError
from unispec.pipelines.drafts.mtp.method import MTP
from unispec.pipelines.runtime.inputs import StepModelInputs, needed_input, refuse_inputs
from unispec.pipelines.runtime.outputs import StepModelOutputs
from unispec.pipelines.targets.deepseek import DEEPSEEK_V3
from unispec.pipelines.targets.deepseek.model import DeepseekV3Model
from unispec.pipelines.unified.method import DraftMethod
from unispec.pipelines.unified.target import TargetFamily
from unispec.sampling.late_masks import LATE_MASKS

from .config import UnifiedMTPDeepseekV3Config
from .inputs import UnifiedMTPDeepseekV3Inputs

__all__ = ["UnifiedMTPDeepseekV3Model"]


class UnifiedMTPDeepseekV3Model(DeepseekV3Model):
    """DeepSeek-V3 target and its MTP layer in one compiled graph; see `UnifiedModel`.

    Args:
        *args: as `UnifiedModel` takes them.
        late_masks: on GPUs: build a graph that waits for its masks, see `LATE_MASKS`. For programs
            that call `execute` themselves; `SpeculativePipeline` knows its masks before a step.
        **kwargs: as `UnifiedModel` takes them.

    Raises:
        InputError: late masks on a CPU, devices that do not run it together, or a checkpoint that
            does not fit.
    """

    family: ClassVar[TargetFamily] = DEEPSEEK_V3
    method: ClassVar[DraftMethod | None] = MTP
    model_config_cls: ClassVar[type[Any]] = UnifiedMTPDeepseekV3Config
    """The class that reads `PipelineConfig`."""
    inputs_cls: ClassVar[type[StepModelInputs]] = UnifiedMTPDeepseekV3Inputs

    def __init__(self, *args: Any, late_masks: bool = False, **kwargs: Any) -> None:
        self._late_masks = late_masks
        super().__init__(*args, **kwargs)

    def load_model(self, session: InferenceSession) -> Any:
        """Reads the checkpoint, builds the graph and compiles it with the session.

        Raises:
            InputError: a tensor is missing, unknown, of another shape or not finite, of the
                MTP layer too.
        """
        self.arch_config = replace(self.arch_config, late_masks=self._late_masks)
        return super().load_model(session)

    def execute(self, model_inputs: ModelInputs) -> StepModelOutputs:
        """Runs one step; a `pinned_bitmask` that is set decides which tokens are allowed.

        A graph with late masks needs it in every step, complete or not, and waits for it. It alone
        decides there: what `token_bitmask` allows must be in it, `min_new_tokens` too.

        Args:
            model_inputs: a `UnifiedMTPDeepseekV3Inputs` with all that the graph takes.

        Returns:
            As `UnifiedModel.execute`.

        Raises:
            InputError: an input is missing, of another shape, or set though the graph does not
                take it.
        """
        assert isinstance(model_inputs, UnifiedMTPDeepseekV3Inputs)
        draft_tokens: Any = needed_input(model_inputs, "draft_tokens")
        rows, drafts = draft_tokens.shape
        vocab_size = self.arch_config.target.vocab_size
        if self._late_masks:
            words = (rows, drafts + 1, -(-vocab_size // 32))
            for name, shape in zip(LATE_MASKS, (words, (2,), words), strict=True):
                _check_shape(model_inputs, name, shape)
            return super().execute(model_inputs)
        refuse_inputs(model_inputs, ["wait_payload", "device_bitmask_scratch"])
        if model_inputs.pinned_bitmask is not None:
            _check_shape(model_inputs, "pinned_bitmask", (rows, drafts + 1, vocab_size))
            packed = _packed(model_inputs.pinned_bitmask).to(self.devices[0])
            model_inputs = replace(model_inputs, token_bitmask=packed, pinned_bitmask=None)
        return super().execute(model_inputs)


def _check_shape(inputs: UnifiedMTPDeepseekV3Inputs, name: str, expected: tuple[int, ...]) -> None:
    buffer: Any = needed_input(inputs, name)
    if tuple(buffer.shape) != expected:
        raise InputError(
            f"{name} has shape {list(buffer.shape)}, the step needs {list(expected)}: see"
            f" {type(inputs).__name__}"
        )


def _packed(mask: Buffer) -> Buffer:
    """int32 `[B, K + 1, ceil(V / 32)]` of bool `[B, K + 1, V]`."""
    allowed = mask.to_numpy().astype(bool)
    padding = [(0, 0), (0, 0), (0, -allowed.shape[2] % 32)]
    packed = np.packbits(np.pad(allowed, padding), axis=-1, bitorder="little")
    return Buffer.from_numpy(packed.view(np.int32))
