"""The pipeline model: loads both checkpoints and compiles the unified graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from max.engine import InferenceSession, Model

from unispec.pipelines.drafts.eagle.weights import eagle_state_dict
from unispec.pipelines.drafts.model import UnifiedLlama3Model

from .config import UnifiedEagleLlama3Config
from .graph import UnifiedEagleLlama3, build_graph
from .inputs import UnifiedEagleLlama3Inputs

__all__ = ["UnifiedEagleLlama3Model"]


class UnifiedEagleLlama3Model(UnifiedLlama3Model):
    """Llama 3 target and EAGLE draft in one compiled graph; see `UnifiedModel`.

    Args:
        pipeline_config: target, draft and speculative configuration.
        session: compiles and runs the graph.
        devices: one CPU or one GPU.
        kv_cache_config: page size and prefix caching.
        weights: the target's weights; their files are read as `pipeline_config` names them.
        adapter: not used, the checkpoint's names are known.
        return_logits: the graph keeps its logits to itself, whatever is asked.
        return_hidden_states: likewise.
        max_batch_size: most rows in one step.
        memory_plan: sizes planned by a server; without one, those of `pipeline_config`.

    Raises:
        InputError: more than one device, or a checkpoint that does not fit.
    """

    model_config_cls: ClassVar[type[Any]] = UnifiedEagleLlama3Config
    """The class that reads `PipelineConfig`."""
    inputs_cls = UnifiedEagleLlama3Inputs
    draft_reads_next_token = True

    def load_model(self, session: InferenceSession) -> Model:
        """Reads both checkpoints, builds the graph and compiles it with the session.

        Args:
            session: compiles and runs the graph.

        Raises:
            InputError: a tensor is missing, unknown, of another shape or not finite.
        """
        config: UnifiedEagleLlama3Config = self.arch_config
        target, (tensors, draft_hf, source) = self.read_both(config.target)
        draft = eagle_state_dict(tensors, draft_hf, config.target, source=source)
        stack = replace(config.draft, vocab_size=draft.num_proposed(config.target.vocab_size))
        config = replace(config, draft=stack)
        module = UnifiedEagleLlama3(config, fc_bias="fc.bias" in draft.state)
        self.load_both(module, target, draft, config.target.dtype)
        return self.compile(session, build_graph(config, module), module.state_dict())
