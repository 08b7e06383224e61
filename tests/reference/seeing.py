"""A Kimi K2.5 target in torch: transformers' DeepSeek-V3 with image features among its tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from .kimi_vision import KimiVisionReference
from .target import TargetReference

__all__ = ["SeeingReference"]


class SeeingReference(TargetReference):
    """The language model of a checkpoint; ``show`` says what it sees.

    Attributes:
        vision: Tower and projector of the same checkpoint.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        """Loads the checkpoint; its language part is written to ``scratch`` once more."""
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self.vision = KimiVisionReference(tensors, config["vision_config"])
        text = config["text_config"] | {"model_type": "deepseek_v3"}
        scratch.mkdir()
        (scratch / "config.json").write_text(json.dumps(text))
        language = {
            name.removeprefix("language_model."): tensor
            for name, tensor in tensors.items()
            if name.startswith("language_model.")
        }
        save_file(language, scratch / "model.safetensors", metadata={"format": "pt"})
        super().__init__(scratch)
        self._seen: dict[int, Tensor] = {}

    def show(self, features: dict[int, Tensor]) -> None:
        """From now on these positions of every sequence hold features [H], not tokens."""
        self._seen = features

    @torch.inference_mode()
    def extend(self, ids: Sequence[int], cache: DynamicCache) -> Tensor:
        """As ``TargetReference.extend``, with what is shown in its place."""
        start = cache.get_seq_length()
        embedded = self.embedding[list(ids)].clone()  # [T, H]
        for index in range(len(ids)):
            if start + index in self._seen:
                embedded[index] = self._seen[start + index]
        decoder = self.model.get_decoder()
        output = decoder(inputs_embeds=embedded[None], past_key_values=cache, use_cache=True)
        features: Tensor = output.last_hidden_state[0]
        return features
