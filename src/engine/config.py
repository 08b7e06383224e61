"""What an engine is built from, as a command line or a program states it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from unispec.batch_schedule import BatchSchedule
from unispec.encodings import DRAFT_ENCODINGS, ENCODINGS
from unispec.errors import InputError
from unispec.methods import (
    AUTO,
    DRAFT_METHODS,
    DRAFTLESS,
    METHODS,
    Method,
    check_num_speculative_tokens,
    largest_when,
)
from unispec.pipelines.lookup.options import DEFAULT_LOOKUP_MAX, DEFAULT_LOOKUP_MIN, LookupOptions

__all__ = ["EngineConfig"]

_DraftProposal: TypeAlias = Literal["argmax", "sampled"]

_POSITIVE: Final = (
    "max_length",
    "max_batch_size",
    "max_batch_input_tokens",
    "kv_cache_pages",
    "relaxed_topk",
    "prompt_lookup_min",
)
_AT_LEAST_0: Final = ("prompt_lookup_max", "prompt_lookup_store")
# What a field holds, in words, its types and the fields; one whose default is None may be that.
_KINDS: Final = (
    ("an integer", (int,), (*_POSITIVE, *_AT_LEAST_0)),
    ("a number", (int, float), ("relaxed_delta", "synthetic_acceptance_rate")),
    (
        "True or False",
        (bool,),
        (
            "enable_prefix_caching",
            "use_relaxed_acceptance_for_thinking",
            "device_graph_capture",
        ),
    ),
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
    """Folder or repository of the draft; None: the target alone, n-grams, or MTP."""
    speculative_method: Method | None = None
    """`"dflash"`, `"eagle"` (EAGLE-3, too, if the draft is that), `"eagle3"`, `"mtp"` or `"ngram"`,
    which has no draft; None: the target alone."""
    num_speculative_tokens: int | Literal["auto"] | None = None
    """K, draft tokens a step, 1 to 8, with n-grams 1 to 31, of a DFlash draft what it was trained
    for. `"auto"`: each step chooses what makes the most tokens a second. None: `"auto"`, but with
    sampled drafts, relaxed or synthetic acceptance, where answers depend on K, 3 for EAGLE and 1
    for MTP."""
    num_speculative_tokens_per_batch_size: BatchSchedule | None = None
    """K by the number of requests in a step, in place of `num_speculative_tokens`:
    `BatchSchedule.read([[1, 4, 3], [5, 32, 1]])`."""
    prompt_lookup_min: int = DEFAULT_LOOKUP_MIN
    """Tokens at an answer's end that have to stand before, in the prompt or the answer, to propose
    what followed them."""
    prompt_lookup_max: int | None = None
    """Tokens that are compared; 0: nothing is looked up. None: 16 with n-grams, or beside a draft
    where K is `"auto"`, or `prompt_lookup_min` if that is more; else 0."""
    prompt_lookup_store: int = 0
    """Tokens of finished answers that are looked up for all later requests; 0: none. What a request
    is told then depends on earlier answers in its timing, never in its text."""
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
    synthetic_acceptance_rate: float | None = None
    """Lossy, for benchmarks: the probability, 0 to 1, with which each draft stands, whatever it is;
    None: drafts are verified."""
    thinking_tokens: tuple[str, str] = ("<think>", "</think>")
    """What opens and what closes a thinking block; for relaxed acceptance only."""
    device_graph_capture: bool = False
    """On a GPU: whether decode steps of the same kind are recorded once and launched all at once.
    Not tried on a GPU yet."""
    compiled: Path | None = None
    """A folder of `Engine.compile` with the compiled graph; None: it is compiled."""

    def __post_init__(self) -> None:
        self._check_kinds()
        if self.device_graph_capture and self.devices == "cpu":
            raise InputError(
                "device_graph_capture needs a GPU: leave it out, or give devices 'gpu'"
            )
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
        if self.draft_model is not None and self.speculative_method in DRAFTLESS:
            raise InputError(
                f"draft model {self.draft_model} is given, but {self.speculative_method!r} has no"
                " draft; give the draft's own method, which looks up n-grams, too"
            )
        if self.draft_model is not None and self.speculative_method not in DRAFT_METHODS:
            raise InputError(
                f"draft model {self.draft_model} is given, but the draft of"
                f" {self.speculative_method!r} is part of the target's checkpoint; leave it out"
            )
        if self.speculative_method in DRAFTLESS and self._answers_depend_on_drafts:
            raise InputError(
                "draft_proposal 'sampled', use_relaxed_acceptance_for_thinking and"
                " synthetic_acceptance_rate need a draft, and"
                f" {self.speculative_method!r} has none; leave them out"
            )
        self._check_draft_counts()
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
        if self.synthetic_acceptance_rate is not None:
            self._check_synthetic(self.synthetic_acceptance_rate)
        for smallest, names in ((1, _POSITIVE), (0, _AT_LEAST_0)):
            for name in names:
                value = getattr(self, name)
                if value is not None and value < smallest:
                    raise InputError(f"{name} is {value}; choose at least {smallest}")
        self._check_lookup()

    @property
    def draft_count(self) -> int | Literal["auto"] | BatchSchedule | None:
        """K as it is asked for, with the default where nothing is; None: that of the method."""
        if self.num_speculative_tokens_per_batch_size is not None:
            return self.num_speculative_tokens_per_batch_size
        if self.num_speculative_tokens is not None or self._answers_depend_on_drafts:
            return self.num_speculative_tokens
        return None if self.speculative_method is None else AUTO

    @property
    def largest_draft_count(self) -> int | None:
        """K of the graph and of the room in the caches; None: the draft's block decides."""
        count = self.draft_count
        return largest_when(
            self.speculative_method, count.largest if isinstance(count, BatchSchedule) else count
        )

    def loaded_count(self, largest: int) -> int | Literal["auto"] | BatchSchedule:
        """K that steps begin with.

        Args:
            largest: K of the graph that is loaded.
        """
        count = self.draft_count
        return largest if count is None or isinstance(count, int) else count

    @property
    def num_looked_up(self) -> int:
        """Drafts that the cache of a target alone has room for."""
        if self.speculative_method not in DRAFTLESS:
            return 0
        return self.largest_draft_count or 0

    @property
    def lookup(self) -> LookupOptions | None:
        """What is looked up; None: nothing."""
        longest = self.prompt_lookup_max
        if longest is None:
            wanted = self.speculative_method in DRAFTLESS or self.draft_count == AUTO
            longest = max(DEFAULT_LOOKUP_MAX, self.prompt_lookup_min) if wanted else 0
        if self.speculative_method is None or not longest:
            return None
        return LookupOptions(self.prompt_lookup_min, longest, self.prompt_lookup_store)

    @property
    def _answers_depend_on_drafts(self) -> bool:
        return (
            self.draft_proposal != "argmax"
            or self.use_relaxed_acceptance_for_thinking
            or self.synthetic_acceptance_rate is not None
        )

    def _check_draft_counts(self) -> None:
        schedule, count = self.num_speculative_tokens_per_batch_size, self.num_speculative_tokens
        if count is not None:
            check_num_speculative_tokens(self.speculative_method, count)
        if count == AUTO and self._answers_depend_on_drafts:
            raise InputError(
                "num_speculative_tokens 'auto' chooses by time, and with sampled drafts, relaxed or"
                " synthetic acceptance answers depend on it; give a number, or leave it out"
            )
        if (schedule or self.prompt_lookup_max) and self._answers_depend_on_drafts:
            raise InputError(
                "num_speculative_tokens_per_batch_size and prompt_lookup_max are given, but with"
                " sampled drafts, relaxed or synthetic acceptance answers would depend on them;"
                " leave them out"
            )
        if schedule is None:
            return
        if not isinstance(schedule, BatchSchedule):
            raise InputError(
                f"num_speculative_tokens_per_batch_size is {schedule!r}; give a BatchSchedule,"
                " such as BatchSchedule.read([[1, 4, 3], [5, 32, 1]])"
            )
        if count is not None:
            raise InputError(
                f"num_speculative_tokens {count} and num_speculative_tokens_per_batch_size exclude"
                " each other; give one of them"
            )
        check_num_speculative_tokens(
            self.speculative_method,
            schedule.largest,
            asked="num_speculative_tokens_per_batch_size has a K of",
        )

    def _check_lookup(self) -> None:
        longest = self.prompt_lookup_max
        if self.speculative_method in DRAFTLESS and longest == 0:
            raise InputError(
                "prompt_lookup_max is 0, and 'ngram' proposes nothing else; choose at least 1, or"
                " leave the method out"
            )
        if longest and longest < self.prompt_lookup_min:
            raise InputError(
                f"prompt_lookup_max is {longest}, below prompt_lookup_min"
                f" {self.prompt_lookup_min}; raise it, or lower the other"
            )
        if longest and self.speculative_method is None:
            raise InputError(
                f"prompt_lookup_max is {longest}, but there is no speculative method; give 'ngram',"
                " or a draft"
            )
        if self.prompt_lookup_min != DEFAULT_LOOKUP_MIN and self.lookup is None:
            raise InputError(
                f"prompt_lookup_min is {self.prompt_lookup_min}, but nothing is looked up; give"
                " speculative_method 'ngram', or prompt_lookup_max beside a draft"
            )
        if self.prompt_lookup_store and self.lookup is None:
            raise InputError(
                f"prompt_lookup_store is {self.prompt_lookup_store}, but nothing is looked up; give"
                " speculative_method 'ngram', or prompt_lookup_max beside a draft"
            )

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
        if self.compiled is not None and not isinstance(self.compiled, Path):
            raise InputError(f"compiled is {self.compiled!r}; give a Path")

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

    def _check_synthetic(self, rate: float) -> None:
        if self.speculative_method is None:
            raise InputError(
                "synthetic_acceptance_rate needs a speculative method; give one, or leave it out"
            )
        if self.draft_proposal != "argmax" or self.use_relaxed_acceptance_for_thinking:
            raise InputError(
                "synthetic_acceptance_rate takes the place of every other acceptance; leave out"
                " draft_proposal and use_relaxed_acceptance_for_thinking"
            )
        if not 0 <= rate <= 1:
            raise InputError(f"synthetic_acceptance_rate is {rate}; choose 0 to 1")
