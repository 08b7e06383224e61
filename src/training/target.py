"""The target in torch: its answers, and the features that drafts read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from unispec.checkpoints.generation_config import read_eos_token_ids
from unispec.checkpoints.model_config import read_model_config
from unispec.errors import InputError

from .attention import GROUPED

__all__ = ["Answered", "TorchTarget"]

_ARCHITECTURE = "LlamaForCausalLM"


class Answered(NamedTuple):
    """A prompt with its answer, and what a draft reads of it."""

    tokens: list[int]
    """Prompt and answer, the token that ended it included."""
    prompt_length: int
    """Tokens of the prompt."""
    features: Tensor
    """float16 `[T, F]` on the CPU; values beyond float16 are its largest. The last row is zero: the
    target did not read that token, and no draft reads its feature."""


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
        if device == "cpu":
            self.model.set_attn_implementation(GROUPED)
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
            temperatures: of each answer; 0 is greedy.
            layers: decoder layers whose outputs are the features, side by side; none takes the
                output of the final norm.
            max_new_tokens: longest answer.
            seed: of the sampling.

        Raises:
            InputError: a logit is no number.
        """
        longest = max(map(len, prompts))
        rows = [[self._pad] * (longest - len(ids)) + list(ids) for ids in prompts]
        seen = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        torch.manual_seed(seed)
        with self._features(layers) as passes:
            output = self.model.generate(
                torch.tensor(rows, device=self.device),
                attention_mask=torch.tensor(seen, device=self.device),
                generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                    max_new_tokens=max_new_tokens,
                    eos_token_id=self.eos or None,
                    pad_token_id=self._pad,
                    do_sample=True,
                    top_k=0,
                ),
                logits_processor=LogitsProcessorList(
                    [_Temperatures(self.name, torch.tensor(temperatures, device=self.device))]
                ),
            )
        features = torch.cat([torch.cat(taps, dim=-1) for taps in passes], dim=1)  # [S, L - 1, F]
        answered = []
        for row, prompt in enumerate(prompts):
            tokens = [*prompt, *self._until_end(output[row, longest:].tolist())]
            begin = longest - len(prompt)
            own = features[row, begin : begin + len(tokens) - 1]
            answered.append(Answered(tokens, len(prompt), F.pad(own, (0, 0, 0, 1))))
        return answered

    @contextmanager
    def _features(self, layers: Sequence[int]) -> Iterator[list[list[Tensor]]]:
        """Takes down what each pass puts out: of every tap, float16 `[S, T, H]` on the CPU."""
        decoder = self.model.get_decoder()
        tapped = [decoder.layers[layer] for layer in layers] or [decoder.norm]
        largest = torch.finfo(torch.float16).max
        passes: list[list[Tensor]] = []

        def keep(module: Any, _: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if module is tapped[0]:
                passes.append([])
            passes[-1].append(states.clamp(-largest, largest).to(torch.float16).cpu())

        with ExitStack() as hooks:
            for module in tapped:
                hooks.callback(module.register_forward_hook(keep).remove)
            yield passes

    def _until_end(self, answer: list[int]) -> list[int]:
        for length, token in enumerate(answer, start=1):
            if token in self.eos:
                return answer[:length]
        return answer


class _Temperatures(LogitsProcessor):
    """Divides each row's logits by its own temperature; of a greedy row leaves the best.

    Args:
        name: of the target.
        temperatures: `[S]`.
    """

    def __init__(self, name: str, temperatures: Tensor) -> None:
        self._name = name
        self._greedy = (temperatures == 0)[:, None]
        self._divisors = temperatures[:, None].where(~self._greedy, 1.0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Takes and returns `[S, V]`."""
        if scores.isnan().any():
            raise InputError(f"{self._name} computes NaN: use a sound checkpoint")
        best = torch.full_like(scores, float("-inf"))
        best.scatter_(1, scores.argmax(dim=-1, keepdim=True), 0.0)
        return torch.where(self._greedy, best, scores / self._divisors)
