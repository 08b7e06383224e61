"""The pipeline model of a target and a draft method, or of a target alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef
from max.nn.kv_cache import KVCacheParams
from max.pipelines.lib import KVCacheConfig, PipelineConfig

from unispec.checkpoints.quantise import encode_state
from unispec.checkpoints.tied_head import HEAD
from unispec.pipelines.runtime.compiled import facts_of
from unispec.pipelines.runtime.model import StepModel
from unispec.pipelines.speculative.deferred import FeatureType

from .checkpoint import Checkpoint, read_checkpoint
from .graph import UnifiedStep, build_graph
from .method import DraftMethod
from .target import TargetFamily
from .weights import load_weights

__all__ = ["UnifiedModel"]


class UnifiedModel(StepModel):
    """A target, and a draft if there is one, in one compiled graph; see `StepModel`.

    A subclass names both, and the classes of configuration and inputs.
    """

    family: ClassVar[TargetFamily]
    """The target."""
    method: ClassVar[DraftMethod | None] = None
    """The draft method; None: the target alone, one token a step."""

    @classmethod
    def get_kv_params(
        cls,
        huggingface_config: Any,
        pipeline_config: PipelineConfig,
        devices: list[DeviceRef],
        kv_cache_config: KVCacheConfig,
        cache_dtype: DType,
    ) -> KVCacheParams:
        """Parameters of the target's cache, with room for drafts.

        `model_config_cls` has those of the draft's cache too.

        Args:
            pipeline_config: for the method and K, which is the room that drafts need.
        """
        hf = huggingface_config.get_text_config()
        params: KVCacheParams = cls.family.config.construct_kv_params(
            hf, pipeline_config, devices, kv_cache_config, cache_dtype
        )
        draft = pipeline_config.draft_model
        if cls.method is None or draft is None:
            return params
        width = cls.method.checkpoint_width(draft.huggingface_config)
        return params if width is None else replace(params, num_draft_tokens=width)

    @classmethod
    def draft_reads_next_token(cls) -> bool:
        """Whether the draft's cache entry of a position depends on the token after it."""
        return cls.method is not None and cls.method.reads_next_token

    @property
    def features(self) -> FeatureType | None:
        """What the draft reads of a position; None: no draft, or it reads in each step."""
        config: Any = self.arch_config
        return None if self.method is None else config.features

    def load_model(self, session: InferenceSession) -> Any:
        """Reads the checkpoints, builds the graph and compiles it with the session.

        Raises:
            InputError: a tensor is missing, unknown, of another shape or not finite.
        """
        config: Any = self.arch_config
        stack = config if self.method is None else config.target
        checkpoint = self.read_target(stack)
        target = self.family.state(checkpoint.tensors, stack, source=checkpoint.source)
        encodings = self.encodings
        target = encode_state(target, encodings.target, checkpoint.source)
        # Only the tensors tell.
        stack = replace(stack, tie_word_embeddings=HEAD not in target)
        config = stack if self.method is None else replace(config, target=stack)
        state = {f"target.{name}": tensor for name, tensor in target.items()}
        if self.method is not None:
            draft_checkpoint = self._draft_checkpoint(checkpoint)
            draft = self.method.state(draft_checkpoint, config, target)
            own = encode_state(draft.state, encodings.draft, draft_checkpoint.source)
            state |= {f"draft.{name}": tensor for name, tensor in own.items()}
            config = config.with_draft(draft)
        module = UnifiedStep(config, self.family, self.method, self.inputs_cls)
        load_weights(module, state)
        facts = facts_of(module.name, module.signature().types(), config)
        return self.compile(session, lambda: build_graph(module), module.state_dict(), facts)

    def read_target(self, stack: Any) -> Checkpoint:
        """The target's checkpoint, as the stack takes it.

        Raises:
            InputError: a file is missing or damaged, or scales do not fit.
        """
        return self.family.read(self.pipeline_config.model, stack)

    def _draft_checkpoint(self, target: Checkpoint) -> Checkpoint:
        """The draft's, or the target's where it has the draft."""
        draft = self.pipeline_config.draft_model
        return target if draft is None else read_checkpoint(draft)
