"""The target in torch: its answers, and the features that drafts read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from unispec.checkpoints.generation_config import read_eos_token_ids
from unispec.checkpoints.model_config import read_model_config
from unispec.checkpoints.repository import find_config, weight_files
from unispec.checkpoints.tokenizer import read_tokenizer
from unispec.errors import InputError

from .answering import answer
from .attention import GROUPED
from .settings import Choices, Device, Dtype, check

__all__ = ["Answered", "TorchTarget"]

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


class Answered(NamedTuple):
    """A prompt with its answer, and what a draft reads of it."""

    tokens: list[int]
    """Prompt and answer, the token that ended it included."""
    prompt_length: int
    """Tokens of the prompt."""
    features: Tensor
    """float16 `[T, F]` on the CPU, clamped to float16's range. The last row is zero: the target did
    not read that token, and no draft reads its feature."""


class TorchTarget:
    """A Llama or a Mistral in Hugging Face's format.

    Args:
        model: folder or Hugging Face repository id.
        device: where it runs.
        dtype: number format of weights and activations.

    Attributes:
        name: the folder or repository id.
        model: the model of transformers.
        config: the model's configuration.
        tokenizer: the model's tokenizer.
        eos: ids of the tokens that end an answer, ascending.

    Raises:
        InputError: another architecture, weights that are missing or cannot be read, or no
            such device.
    """

    def __init__(self, model: str, device: Device = "cpu", dtype: Dtype = "float32") -> None:
        check("device", device, Choices(get_args(Device)))
        check("dtype", dtype, Choices(get_args(Dtype)))
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("device is 'cuda', but torch finds no GPU: choose 'cpu'")
        self.name, self.device = model, torch.device(device)
        self.config: Any = read_model_config(model)
        (architecture,) = self.config.architectures or [""]
        if architecture not in _ARCHITECTURES:
            raise InputError(
                f"{model}: a draft is trained for {' or '.join(_ARCHITECTURES)}, not for"
                f" {architecture}: choose a Llama or a Mistral"
            )
        self.tokenizer: Any = read_tokenizer(model, self.config.model_type)
        self._limits = {"max_position_embeddings": self.config.max_position_embeddings}
        # `write` keeps within a Mistral's window, so that no layer needs one.
        if self.config.model_type == "mistral" and self.config.sliding_window is not None:
            self._limits["sliding_window"] = self.config.sliding_window
            self.config.sliding_window = None
        self.model: Any
        # Downloads those of a repository into the folder of its config.json.
        weight_files(model)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                find_config(model).parent,
                config=self.config,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"{model} cannot be loaded ({' '.join(str(error).split())}): use a folder with"
                " safetensors"
            ) from error
        self.model, found = loaded
        if found["missing_keys"]:
            missing = ", ".join(sorted(found["missing_keys"]))
            raise InputError(f"{model} lacks {missing}: use the whole checkpoint")
        self.model.to(device).eval().requires_grad_(False)
        if device == "cpu":
            self.model.set_attn_implementation(GROUPED)
        self.eos = sorted(read_eos_token_ids(model, self.config))

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

    @property
    def norm(self) -> Tensor:
        """Weight of the final norm, float32 `[H]`."""
        weight: Tensor = self.model.get_decoder().norm.weight
        return weight.float()

    def check_length(self, prompt_length: int, max_new_tokens: int) -> None:
        """Refuses texts that the model cannot read to the end.

        Args:
            prompt_length: tokens of the longest prompt.
            max_new_tokens: length of the longest answer.

        Raises:
            InputError: prompt and answer are longer than the model's positions or, of a Mistral,
                its sliding window.
        """
        name, limit = min(self._limits.items(), key=lambda item: item[1])
        if prompt_length + max_new_tokens > limit:
            raise InputError(
                f"the longest prompt has {prompt_length} tokens and answers have up to"
                f" {max_new_tokens}, more than the {name} {limit} of {self.name}: shorten the"
                " prompts or lower max_new_tokens"
            )

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        layers: Sequence[int],
        max_new_tokens: int,
        seed: int,
    ) -> list[Answered]:
        """Answers prompts in one batch.

        Args:
            prompts: token ids.
            temperatures: one for each answer; 0 is greedy.
            layers: decoder layers, ascending, whose outputs are the features, side by side; one
                more than the last layer, or none at all, takes the output of the final norm.
            max_new_tokens: length of the longest answer.

        Raises:
            InputError: the target computes NaN, or see `check_length`.
        """
        self.check_length(max(map(len, prompts)), max_new_tokens)
        width = self.config.hidden_size * max(len(layers), 1)
        longest = max(map(len, prompts)) + max_new_tokens
        features = torch.zeros(len(prompts), longest, width, dtype=torch.float16)  # [B, T, F]
        largest = torch.finfo(torch.float16).max

        with self._tapped(layers) as taps:

            def keep(rows: Tensor, positions: Tensor, hidden: Tensor) -> None:
                states = torch.cat(taps, dim=-1) if taps else hidden  # [B, T, F]
                taps.clear()
                read = positions >= 0
                kept = states[read].to(torch.float16).clamp(-largest, largest).cpu()
                features[rows[:, None].expand_as(positions)[read].cpu(), positions[read].cpu()] = (
                    kept
                )

            answers = self.write(prompts, temperatures, max_new_tokens, self.eos, seed, keep)
        return [
            Answered([*prompt, *written], len(prompt), own[: len(prompt) + len(written)])
            for prompt, written, own in zip(prompts, answers, features, strict=True)
        ]

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        max_new_tokens: int,
        ends: Sequence[int],
        seed: int,
        on_pass: Callable[[Tensor, Tensor, Tensor], None] = lambda rows, positions, hidden: None,
    ) -> list[list[int]]:
        """The tokens that the target writes behind prompts, what ended them included.

        Args:
            prompts: token ids.
            temperatures: one for each text; 0 is greedy.
            max_new_tokens: length of the longest text.
            ends: tokens that end a text.
            on_pass: see `answer`.

        Raises:
            InputError: the target computes NaN, or see `check_length`.
        """
        self.check_length(max(map(len, prompts)), max_new_tokens)
        try:
            return answer(self.model, prompts, temperatures, max_new_tokens, ends, seed, on_pass)
        except ArithmeticError as error:
            raise InputError(f"{self.name} computes NaN: use a sound checkpoint") from error

    @contextmanager
    def _tapped(self, layers: Sequence[int]) -> Iterator[list[Tensor]]:
        """Records the outputs of these layers in a pass, each `[B, T, H]`."""
        taps: list[Tensor] = []

        def keep(module: Any, _: Any, output: Any) -> None:
            taps.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as hooks:
            decoder = self.model.get_decoder()
            for layer in layers:
                tapped = [*decoder.layers, decoder.norm][layer]
                hooks.callback(tapped.register_forward_hook(keep).remove)
            yield taps
