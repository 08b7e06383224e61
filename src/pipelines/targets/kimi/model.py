"""What the pipeline models of Kimi K2.5 share: the vision graph, and images in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from max.driver import Buffer
from max.engine import InferenceSession, Model
from max.graph import Graph
from max.graph import Module as CompilationUnit
from max.nn import Module
from max.pipelines.context import TextContext
from max.pipelines.lib import ModelInputs, UnifiedEagleOutputs

from unispec.checkpoints import Tensor
from unispec.checkpoints.cast import cast_weights
from unispec.checkpoints.tied_head import HEAD
from unispec.errors import InputError
from unispec.pipelines.runtime.inputs import StepModelInputs
from unispec.pipelines.runtime.prompts import Prompt
from unispec.pipelines.runtime.weights import read_weights
from unispec.pipelines.speculative.step import StepInputs, StepOutputs, StepSignature
from unispec.pipelines.speculative.target_only import target_only_step
from unispec.pipelines.targets.deepseek.config import DeepseekV3Config
from unispec.pipelines.targets.deepseek.model import DeepseekV3Model
from unispec.pipelines.targets.deepseek.stack import DeepseekV3
from unispec.pipelines.targets.deepseek.weights import cast_stack, dequantised, target_state_dict
from unispec.sampling.acceptance import Matching

from .config import KimiK2_5Config, VisionConfig
from .context import MediaPrompt, media_items, widen_placeholders
from .encoder import MediaEncoder
from .given import given_features
from .inputs import KIMI_ORDER, KimiK2_5ModelInputs, kimi_types
from .preprocessing import patches_of
from .target import SeeingTarget
from .vision import VisionModel, build_vision_graph
from .weights import language_tensors, vision_state_dict

__all__ = ["KimiK2_5Model"]


class _TargetOnly(Module):
    def __init__(self, config: KimiK2_5Config) -> None:
        super().__init__()
        self.target = DeepseekV3(config)

    def __call__(self, step: StepInputs) -> StepOutputs:
        return target_only_step(SeeingTarget(self.target, step), Matching(), step)


class KimiK2_5Model(DeepseekV3Model):
    """A Kimi K2.5 target that decodes one token a step; see `UnifiedModel`.

    Attributes:
        encoder: Runs the vision graph; a step without images does not call it.
    """

    model_config_cls: ClassVar[type[Any]] = KimiK2_5Config
    """The class that reads `PipelineConfig`."""
    inputs_cls: ClassVar[type[StepModelInputs]] = KimiK2_5ModelInputs
    reads_images: ClassVar[bool] = True
    encoder: MediaEncoder

    def load_model(self, session: InferenceSession) -> Any:
        """Reads the checkpoint, builds both graphs and compiles them with the session.

        Args:
            session: compiles and runs the graphs.

        Returns:
            The vision graph, then the language graph.

        Raises:
            InputError: a tensor is missing, unknown, of another shape or not finite.
        """
        config: KimiK2_5Config = self.arch_config
        tensors, target = self.read_language(config)
        vision = self.read_vision(tensors, config.vision)
        module = _TargetOnly(config)
        state = {f"target.{name}": tensor for name, tensor in target.items()}
        module.load_state_dict(cast_stack(state, config.dtype), weight_alignment=1)
        inputs = StepSignature(
            self.device_ref,
            config.vocab_size,
            config.kv_params,
            order=KIMI_ORDER,
            more=kimi_types(config.hidden_size, config.dtype, self.device_ref),
        )
        unit = CompilationUnit()
        with Graph("kimi_k25_target", input_types=inputs.types(), module=unit) as graph:
            graph.output(*module(inputs.take(graph.inputs)).values())
        return self.compile_with_vision(session, unit, module, vision)

    def read_language(
        self, config: DeepseekV3Config
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        """The whole checkpoint by its own names, and the language model's state dictionary.

        Args:
            config: the language model's stack; learns whether the head is the embedding.

        Raises:
            InputError: a file is missing or damaged, or a tensor of the language model is
                missing, unknown, of another shape or not finite.
        """
        model = self.pipeline_config.model
        tensors, source = read_weights(model, float8_stays=config.fp8 is not None)
        plain = dequantised(language_tensors(tensors), config, source=source)
        state = target_state_dict(plain, config, source=source)
        config.tie_word_embeddings = HEAD not in state
        return tensors, state

    def read_vision(self, tensors: Mapping[str, Tensor], config: VisionConfig) -> VisionModel:
        """The tower and the projector with their weights.

        Args:
            tensors: the whole checkpoint's, by name.
            config: the tower's shapes.

        Raises:
            InputError: a tensor is missing, unexpected, of another shape or not finite.
        """
        source = self.pipeline_config.model.model_name
        state = vision_state_dict(tensors, config, source=source)
        self._positions = state.pop("positions")
        module = VisionModel(config)
        module.load_state_dict(cast_weights(state, config.dtype), weight_alignment=1)
        return module

    def compile_with_vision(
        self,
        session: InferenceSession,
        unit: CompilationUnit,
        language: Module,
        vision: VisionModel,
    ) -> tuple[Model, Model]:
        """Adds the vision graph to the language graph's unit and compiles both at once.

        Args:
            session: compiles and runs the graphs.
            unit: has the language graph.
            language: its weights.
            vision: tower and projector.

        Returns:
            The vision graph, then the language graph.
        """
        graph = build_vision_graph(vision, unit)
        # On a CPU the compiled graphs read the weights where they lie and do not own them.
        self.weights_registry = language.state_dict() | vision.state_dict()
        models = session.load_all(unit, weights_registry=self.weights_registry)
        vision_model = models.pop(graph.name)
        (language_model,) = models.values()
        self.encoder = MediaEncoder(vision_model, vision.config, self._positions, self.devices[0])
        return vision_model, language_model

    def execute(self, model_inputs: ModelInputs) -> UnifiedEagleOutputs:
        """Runs one step, after encoding the patches that it was given, if any.

        Args:
            model_inputs: a `KimiK2_5ModelInputs` with all that the graph takes.

        Raises:
            InputError: an input is missing, set though the graph does not take it, or patches
                that do not fit their grids or places.
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
            huggingface_config: the target's.
            tokens: the encoded prompt, one placeholder an image.
            images: in the order of their placeholders; see `Request.images`.
            name: what to call the prompt in errors.

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

    def more_fields(
        self, replica_batches: Sequence[Sequence[TextContext]], num_drafts: int
    ) -> dict[str, Any]:
        """The fields of `ImageInputs` and `DistributedInputs`.

        Args:
            replica_batches: one batch, the requests in row order.
            num_drafts: draft tokens that the step verifies in every row.
        """
        features: list[npt.NDArray[np.float32]] = []
        places: list[npt.NDArray[np.int64]] = []
        offset = 0
        for context in chain(*replica_batches):
            begin = context.tokens.processed_length
            end = begin + len(context.tokens.active)
            for start, item in media_items(context):
                first, last = max(start, begin), min(start + item.num_features, end)
                if first < last:
                    features.append(self.encoder(item)[first - start : last - start])
                    places.append(np.arange(first, last) - begin + offset)
            offset += end - begin + num_drafts
        more = super().more_fields(replica_batches, num_drafts)
        return {**more, **self._images(features, places)}

    def _images(
        self,
        features: Sequence[npt.NDArray[np.float32]],
        places: Sequence[npt.NDArray[np.int64]],
    ) -> dict[str, list[Buffer]]:
        """The language graph's inputs, `[n, H]` and `[n]`; n may be 0."""
        hf: Any = self.huggingface_config
        width = hf.get_text_config().hidden_size
        device = self.devices[0]
        embeddings = np.concatenate([np.zeros((0, width), np.float32), *features])
        indices = np.concatenate([np.zeros(0, np.int64), *places])
        return {
            "language_image_embeddings": [Buffer.from_numpy(embeddings).to(device)],
            "language_image_token_indices": [Buffer.from_numpy(indices).to(device)],
        }

    def prepare_next_token_inputs(
        self, next_tokens: Buffer, prev_model_inputs: ModelInputs
    ) -> KimiK2_5ModelInputs:
        """Builds the inputs of a plain decode step, which has no images.

        Args:
            next_tokens: int64 `[B]`.
            prev_model_inputs: the inputs of the step that produced them.

        Raises:
            InputError: the previous inputs have another number of rows.
        """
        inputs = super().prepare_next_token_inputs(next_tokens, prev_model_inputs)
        assert isinstance(inputs, KimiK2_5ModelInputs)
        given = (
            "image_token_indices",
            "precomputed_image_embeddings",
            "pixel_values",
            "grid_thws",
            "cu_seqlens",
            "max_seqlen",
            "vision_position_ids",
        )
        fields: dict[str, Any] = {**dict.fromkeys(given), **self._images([], [])}
        return replace(inputs, **fields)

    def _with_features(self, inputs: KimiK2_5ModelInputs) -> KimiK2_5ModelInputs:
        """The inputs with the caller's own patches or features where the graph takes them."""
        if inputs.image_token_indices is None:
            raise InputError(
                "pixel_values or precomputed_image_embeddings is set without image_token_indices;"
                " say where the features stand"
            )
        assert inputs.draft_tokens is not None
        places = inputs.image_token_indices[0].to_numpy()
        rows, drafts = inputs.draft_tokens.shape
        merged = inputs.tokens.shape[0] + rows * drafts
        if len(places) and places.max() >= merged:
            raise InputError(
                f"image_token_indices has {int(places.max())}, but the step has {merged} tokens,"
                " drafts included; give places among them"
            )
        features = given_features(inputs, self.encoder)
        hf: Any = self.huggingface_config
        expected = (len(places), hf.get_text_config().hidden_size)
        if features.shape != expected:
            raise InputError(
                f"image_token_indices names {len(places)} places for features of shape"
                f" {list(features.shape)}; {list(expected)} are needed"
            )
        kept = places >= 0
        images: dict[str, Any] = {**self._images([features[kept]], [places[kept].astype(np.int64)])}
        return replace(inputs, **images)
