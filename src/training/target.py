"""The target in torch: its answers, and the features that drafts read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from unispec.checkpoints.generation_config import read_eos_token_ids
from unispec.checkpoints.model_config import read_model_config
from unispec.errors import InputError

__all__ = ["TorchTarget"]

_ARCHITECTURE = "LlamaForCausalLM"


class TorchTarget:
    """A Llama in Hugging Face's format, float32 on a CPU and bfloat16 on a GPU.

    Args:
        model: folder or Hugging Face repository id.
        device: `cpu` or `cuda`.

    Attributes:
        name: as it was given.
        device: where it runs.
        model: of transformers.
        config: its configuration.
        tokenizer: its tokenizer.
        eos: tokens that end an answer.

    Raises:
        InputError: no Llama, weights that are missing or cannot be read, or no such device.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda was asked for, but torch finds no GPU: use cpu")
        self.name, self.device = model, torch.device(device)
        self.config: Any = read_model_config(model)
        if self.config.architectures != [_ARCHITECTURE]:
            raise InputError(
                f"{model}: a draft is trained for {_ARCHITECTURE}, not for"
                f" {', '.join(self.config.architectures or ['nothing'])}: choose a Llama"
            )
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.model: Any
        self.tokenizer: Any
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model, dtype=dtype, output_loading_info=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"{model} cannot be loaded ({' '.join(str(error).split())}): use a folder with"
                " safetensors and a tokenizer"
            ) from error
        self.model, found = loaded
        if found["missing_keys"]:
            missing = ", ".join(sorted(found["missing_keys"]))
            raise InputError(f"{model} lacks {missing}: use the whole checkpoint")
        self.model.to(device).eval().requires_grad_(False)
        # Its penalties and cuts would take the place of all that is not stated below.
        self.model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        self.eos = sorted(read_eos_token_ids(model, self.config))
        self._pad = self.eos[0] if self.eos else 0

    @property
    def embedding(self) -> Tensor:
        """Token embeddings, float32 `[V, H]`."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.float()

    @property
    def head(self) -> Tensor:
        """The language model head, float32 `[V, H]`."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight.float()

    @torch.inference_mode()
    def answers(
        self, prompts: Sequence[Sequence[int]], temperature: float, max_new_tokens: int, seed: int
    ) -> list[list[int]]:
        """Answers prompts, all at one temperature.

        Args:
            prompts: token ids.
            temperature: 0 is greedy.
            max_new_tokens: longest answer.
            seed: of the sampling.

        Returns:
            Each prompt's answer, the token that ended it included.
        """
        longest = max(map(len, prompts))
        rows = [[self._pad] * (longest - len(ids)) + list(ids) for ids in prompts]
        seen = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        how: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature, "top_k": 0}
            if temperature
            else {"do_sample": False}
        )
        torch.manual_seed(seed)
        output = self.model.generate(
            torch.tensor(rows, device=self.device),
            attention_mask=torch.tensor(seen, device=self.device),
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                max_new_tokens=max_new_tokens,
                eos_token_id=self.eos or None,
                pad_token_id=self._pad,
                **how,
            ),
        )
        return [self._until_end(row) for row in output[:, longest:].tolist()]

    @torch.inference_mode()
    def features(self, sequences: Sequence[Sequence[int]], layers: Sequence[int]) -> list[Tensor]:
        """What a draft reads of the target.

        Args:
            sequences: token ids.
            layers: decoder layers whose outputs are taken, side by side; none takes the output
                of the final norm.

        Returns:
            float16 `[T, F]` on the CPU for each sequence; values beyond float16 become its
            largest.

        Raises:
            InputError: a value is no number.
        """
        longest = max(map(len, sequences))
        rows = [[*ids, *[self._pad] * (longest - len(ids))] for ids in sequences]
        decoder = self.model.get_decoder()
        taps: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for layer in layers:

                def keep(_: Any, __: Any, output: Any, layer: int = layer) -> None:
                    taps[layer] = output[0] if isinstance(output, tuple) else output

                handle = decoder.layers[layer].register_forward_hook(keep)
                hooks.callback(handle.remove)
            normed = decoder(torch.tensor(rows, device=self.device), use_cache=False)[0]
        found = torch.cat([taps[layer] for layer in layers], dim=-1) if layers else normed
        if found.isnan().any():
            raise InputError(f"{self.name} computes NaN: use a sound checkpoint")
        largest = torch.finfo(torch.float16).max
        narrow = found.clamp(-largest, largest).to(torch.float16).cpu()  # [S, T, F]
        return [narrow[row, : len(ids)] for row, ids in enumerate(sequences)]

    def _until_end(self, answer: list[int]) -> list[int]:
        for length, token in enumerate(answer, start=1):
            if token in self.eos:
                return answer[:length]
        return answer
