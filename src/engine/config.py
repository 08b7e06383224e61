"""What an engine is built from, as a command line or a program states it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from unispec.encodings import DRAFT_ENCODINGS, ENCODINGS
from unispec.errors import InputError
from unispec.methods import DRAFT_METHODS, METHODS, Method, check_num_speculative_tokens

__all__ = ["EngineConfig"]

_DraftProposal: TypeAlias = Literal["argmax", "sampled"]

_POSITIVE: Final = (
    "max_length",
    "max_batch_size",
    "max_batch_input_tokens",
    "kv_cache_pages",
    "relaxed_topk",
)
# What a field holds, in words, its types and the fields; one whose default is None may be that.
_KINDS: Final = (
    ("an integer", (int,), _POSITIVE),
    ("a number", (int, float), ("relaxed_delta",)),
    ("True or False", (bool,), ("enable_prefix_caching", "use_relaxed_acceptance_for_thinking")),
    (
        "a text",
        (str,),
        (
            "model",
            "draft_model",
            "devices",
            "quantization_encoding",
            "draft_quantization_encoding",
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One engine: a target, a draft if there is one, and how they run."""

    model: str
    """Folder with config.json, tokenizer and weights, a GGUF file, or a hub repository."""
    weight_path: tuple[Path, ...] = ()
    """Weight files of the target, safetensors or one GGUF; empty: those in `model`."""
    draft_model: str | None = None
    """Folder or repository of the draft; None: the target alone, or MTP."""
    speculative_method: Method | None = None
    """`"dflash"`, `"eagle"` (EAGLE-3, too, if the draft is that), `"eagle3"` or `"mtp"`; None: the
    target alone."""
    num_speculative_tokens: int | None = None
    """K, draft tokens a step, 1 to 8 but for DFlash; None: 3 for EAGLE, 1 for MTP, what a DFlash
    draft was trained for."""
    devices: str = "cpu"
    """`"cpu"`, `"gpu"` or `"gpu:N"`."""
    max_length: int | None = None
    """Longest sequence, prompt and output, in tokens; None: the model's limit."""
    max_batch_size: int = 1
    """Most requests in one step."""
    quantization_encoding: str | None = None
    """One of `unispec.encodings.ENCODINGS` that the target supports. On a CPU it is how the
    target's matrices are stored, None: as the checkpoint has them. On a GPU it is what is computed
    in, None: bfloat16, or float8_e4m3fn for FP8 blocks where the GPU computes in them."""
    draft_quantization_encoding: str | None = None
    """One of `unispec.encodings.DRAFT_ENCODINGS`, how the draft's matrices are stored on a CPU;
    None: as its checkpoint has them."""
    enable_prefix_caching: bool = True
    """Whether requests that begin alike share the cache pages of the beginning."""
    max_batch_input_tokens: int = 512
    """Most new tokens in one step; longer prompts are prefilled in chunks."""
    kv_cache_pages: int | None = None
    """Cache pages of 128 tokens; None: for `max_batch_size` full rows, in 4 GiB at most."""
    draft_proposal: _DraftProposal = "argmax"
    """`"argmax"` or `"sampled"`, how the draft proposes; both are lossless."""
    use_relaxed_acceptance_for_thinking: bool = False
    """Lossy inside thinking blocks: there a draft near the target's best token stands."""
    relaxed_topk: int = 10
    """How many of the target's most probable tokens are near."""
    relaxed_delta: float = 0.6
    """How far below the best token's probability, 0 to 1, one that is near may be."""
    thinking_tokens: tuple[str, str] = ("<think>", "</think>")
    """What opens and what closes a thinking block; for relaxed acceptance only."""

    def __post_init__(self) -> None:
        self._check_kinds()
        if self.speculative_method is not None and self.speculative_method not in METHODS:
            raise InputError(
                f"speculative method {self.speculative_method!r} is unknown; known:"
                f" {', '.join(METHODS)}"
            )
        if self.speculative_method is None and self.draft_model is not None:
            raise InputError(
                f"draft model {self.draft_model} needs its speculative method; give both"
            )
        if self.speculative_method in DRAFT_METHODS and self.draft_model is None:
            raise InputError(
                f"speculative method {self.speculative_method!r} needs a draft model; give one"
            )
        if self.draft_model is not None and self.speculative_method not in DRAFT_METHODS:
            raise InputError(
                f"draft model {self.draft_model} is given, but the draft of"
                f" {self.speculative_method!r} is part of the target's checkpoint; leave it out"
            )
        if self.num_speculative_tokens is not None:
            check_num_speculative_tokens(self.speculative_method, self.num_speculative_tokens)
        if self.quantization_encoding not in (None, *ENCODINGS):
            raise InputError(
                f"quantization encoding {self.quantization_encoding!r} is unknown; use"
                f" {' or '.join(map(repr, ENCODINGS))}"
            )
        self._check_draft_encoding()
        if self.draft_proposal not in get_args(_DraftProposal):
            raise InputError(
                f"draft_proposal {self.draft_proposal!r} is unknown; known:"
                f" {', '.join(get_args(_DraftProposal))}"
            )
        if self.use_relaxed_acceptance_for_thinking:
            self._check_relaxed()
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; choose at least 1")

    def _check_kinds(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for what, kinds, names in _KINDS:
            for name in names:
                value = getattr(self, name)
                if value is None and defaults[name] is None:
                    continue
                # True is an int, and no size.
                if type(value) not in kinds:
                    raise InputError(f"{name} is {value!r}; give {what}")
        paths = self.weight_path
        if not isinstance(paths, tuple | list) or not all(isinstance(p, Path) for p in paths):
            raise InputError(f"weight_path is {paths!r}; give a tuple of Paths")

    def _check_draft_encoding(self) -> None:
        encoding = self.draft_quantization_encoding
        if encoding is None:
            return
        if encoding not in DRAFT_ENCODINGS:
            raise InputError(
                f"draft quantization encoding {encoding!r} is unknown; use"
                f" {' or '.join(map(repr, DRAFT_ENCODINGS))}"
            )
        if self.draft_model is None:
            raise InputError(
                f"draft quantization encoding {encoding!r} is given without a draft model; give"
                " one, or leave it out"
            )
        if self.devices != "cpu":
            raise InputError(
                f"draft quantization encoding {encoding!r} is for a CPU; on {self.devices!r} a"
                " draft computes as its target does: leave it out"
            )

    def _check_relaxed(self) -> None:
        if self.speculative_method is None:
            raise InputError(
                "use_relaxed_acceptance_for_thinking needs a speculative method; give one, or"
                " leave it out"
            )
        if self.draft_proposal != "argmax":
            raise InputError(
                f"draft_proposal {self.draft_proposal!r} and use_relaxed_acceptance_for_thinking"
                " exclude each other; use 'argmax', or leave out the latter"
            )
        if not 0 <= self.relaxed_delta <= 1:
            raise InputError(f"relaxed_delta is {self.relaxed_delta}; choose 0 to 1")
        names = self.thinking_tokens
        are_texts = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
        if not are_texts or len(names) != 2 or names[0] == names[1]:
            raise InputError(
                f"thinking_tokens is {names!r}; give two different tokens, what"
                " opens a block and what closes it"
            )
