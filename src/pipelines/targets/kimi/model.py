"""What a Kimi K2.5 target brings to a step on the host: the vision graph, and images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from max.driver import Buffer
from max.engine import InferenceSession, Model
from max.graph import Graph
from max.pipelines.context import TextContext
from max.pipelines.lib import ModelInputs

from unispec.errors import InputError
from unispec.pipelines.runtime.inputs import StepModelInputs
from unispec.pipelines.runtime.outputs import StepModelOutputs
from unispec.pipelines.runtime.prompts import Prompt
from unispec.pipelines.targets.deepseek.model import DeepseekV3Model
from unispec.pipelines.unified.checkpoint import Checkpoint
from unispec.pipelines.unified.weights import load_weights

from .context import MediaPrompt, media_items, widen_placeholders
from .encoder import MediaEncoder
from .inputs import KimiK2_5ModelInputs
from .preprocessing import patches_of
from .step_images import step_image_features
from .vision import VISION_GRAPH, VisionModel, build_vision_graph
from .weights import vision_state_dict

__all__ = ["KimiK2_5Model"]


class KimiK2_5Model(DeepseekV3Model):
    """A Kimi K2.5 target, and the graph of its vision tower; see `UnifiedModel`.

    Attributes:
        encoder: runs the vision graph; a step without images does not call it.
    """

    inputs_cls: ClassVar[type[StepModelInputs]] = KimiK2_5ModelInputs
    reads_images: ClassVar[bool] = True
    encoder: MediaEncoder
    _vision: VisionModel

    def read_target(self, stack: Any) -> Checkpoint:
        """The checkpoint, of which tower and projector are taken at once.

        Raises:
            InputError: a file is missing or damaged, or a tensor of the vision part is missing,
                unexpected, of another shape or not finite.
        """
        checkpoint = super().read_target(stack)
        state = vision_state_dict(checkpoint.tensors, stack.vision, source=checkpoint.source)
        self._positions = state.pop("positions")
        self._vision = VisionModel(stack.vision)
        load_weights(self._vision, state)
        return checkpoint

    def compile(
        self,
        session: InferenceSession,
        build: Callable[[], Graph],
        weights: Mapping[str, Any],
        facts: Mapping[str, str],
    ) -> tuple[Model, Model]:
        """Compiles the language graph and the vision graph at once; see `StepModel.compile`.

        Returns:
            The vision graph, then the language graph.
        """

        def both() -> Graph:
            graph = build()
            build_vision_graph(self._vision, graph.module)
            return graph

        models = self.compile_all(session, both, {**weights, **self._vision.state_dict()}, facts)
        vision = models.pop(VISION_GRAPH)
        (language,) = models.values()
        self.encoder = MediaEncoder(vision, self._vision.config, self._positions, self.devices[0])
        return vision, language

    def execute(self, model_inputs: ModelInputs) -> StepModelOutputs:
        """Runs one step, after encoding the patches that its inputs have, if any.

        Args:
            model_inputs: a `KimiK2_5ModelInputs` with all that the graph takes.

        Raises:
            InputError: an input is missing, set though the graph does not take it, or patches
                that do not fit their grids or indices.
        """
        assert isinstance(model_inputs, KimiK2_5ModelInputs)
        if model_inputs.has_images:
            model_inputs = self._with_features(model_inputs)
        return super().execute(model_inputs)

    @classmethod
    def read_prompt(
        cls, huggingface_config: Any, tokens: Sequence[int], images: Sequence[Any], *, name: str
    ) -> Prompt:
        """The prompt with one placeholder for each feature of each image.

        Args:
            tokens: the encoded prompt, one placeholder an image.
            images: in the order of their placeholders; see `Request.images`.

        Raises:
            InputError: an image that cannot be read, or another number of placeholders.
        """
        vision = huggingface_config.vision_config
        items = []
        for index, image in enumerate(images):
            try:
                items.append(
                    patches_of(
                        image, patch_size=vision.patch_size, max_frames=vision.init_pos_emb_time
                    )
                )
            except InputError as error:
                raise InputError(f"image {index + 1} of {name}: {error}") from error
        placeholder = huggingface_config.media_placeholder_token_id
        widened = widen_placeholders(tokens, items, placeholder, prompt=name)
        return MediaPrompt(widened, items, placeholder)

    def extra_fields(
        self, replica_batches: Sequence[Sequence[TextContext]], num_drafts: int
    ) -> dict[str, Any]:
        """The fields of `ImageInputs` and `DistributedInputs`."""
        features: list[npt.NDArray[np.float32]] = []
        indices: list[npt.NDArray[np.int64]] = []
        offset = 0
        for context in chain(*replica_batches):
            begin = context.tokens.processed_length
            end = begin + len(context.tokens.active)
            for start, item in media_items(context):
                first, last = max(start, begin), min(start + item.num_features, end)
                if first < last:
                    features.append(self.encoder(item)[first - start : last - start])
                    indices.append(np.arange(first, last) - begin + offset)
            offset += end - begin + num_drafts
        extra = super().extra_fields(replica_batches, num_drafts)
        return {**extra, **self._images(features, indices)}

    def _images(
        self,
        features: Sequence[npt.NDArray[np.float32]],
        indices: Sequence[npt.NDArray[np.int64]],
    ) -> dict[str, list[Buffer]]:
        """The language graph's inputs, `[n, H]` and `[n]`; n may be 0."""
        hf: Any = self.huggingface_config
        width = hf.get_text_config().hidden_size
        device = self.devices[0]
        embeddings = np.concatenate([np.zeros((0, width), np.float32), *features])
        joined = np.concatenate([np.zeros(0, np.int64), *indices])
        return {
            "language_image_embeddings": [Buffer.from_numpy(embeddings).to(device)],
            "language_image_token_indices": [Buffer.from_numpy(joined).to(device)],
        }

    def prepare_next_token_inputs(
        self, next_tokens: Buffer, prev_model_inputs: ModelInputs
    ) -> KimiK2_5ModelInputs:
        """Builds the inputs of a plain decode step, which has no images.

        Args:
            next_tokens: int64 `[B]`.

        Raises:
            InputError: the previous inputs have another number of rows.
        """
        inputs = super().prepare_next_token_inputs(next_tokens, prev_model_inputs)
        assert isinstance(inputs, KimiK2_5ModelInputs)
        handed_over = (
            "image_token_indices",
            "precomputed_image_embeddings",
            "pixel_values",
            "grid_thws",
            "cu_seqlens",
            "max_seqlen",
            "vision_position_ids",
        )
        fields: dict[str, Any] = {**dict.fromkeys(handed_over), **self._images([], [])}
        return replace(inputs, **fields)

    def _with_features(self, inputs: KimiK2_5ModelInputs) -> KimiK2_5ModelInputs:
        """The inputs with the caller's own patches or features where the graph takes them."""
        if inputs.image_token_indices is None:
            raise InputError(
                "pixel_values or precomputed_image_embeddings is set without image_token_indices;"
                " say where the features stand"
            )
        assert inputs.draft_tokens is not None
        indices = inputs.image_token_indices[0].to_numpy()
        rows, drafts = inputs.draft_tokens.shape
        merged = inputs.tokens.shape[0] + rows * drafts
        if len(indices) and indices.max() >= merged:
            raise InputError(
                f"image_token_indices has {int(indices.max())}, but the step has {merged} tokens,"
                " drafts included; give places among them"
            )
        features = step_image_features(inputs, self.encoder)
        hf: Any = self.huggingface_config
        expected = (len(indices), hf.get_text_config().hidden_size)
        if features.shape != expected:
            raise InputError(
                f"image_token_indices names {len(indices)} places for features of shape"
                f" {list(features.shape)}; {list(expected)} are needed"
            )
        kept = indices >= 0
        images: dict[str, Any] = {
            **self._images([features[kept]], [indices[kept].astype(np.int64)])
        }
        return replace(inputs, **images)
