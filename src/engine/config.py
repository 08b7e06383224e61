"""What an engine is built from, as a command line or a program states it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from max.driver import DeviceSpec, accelerator_count
from max.pipelines.lib import (
    KVCacheConfig,
    MAXModelConfig,
    PipelineArgs,
    PipelineConfig,
    PipelineRuntimeConfig,
)
from max.pipelines.modeling.config_enums import supported_encoding_supported_on
from max.pipelines.speculative import SpeculativeConfig
from pydantic import ValidationError

from unispec.checkpoints import check_weight_files
from unispec.checkpoints.draft_config import adopt, read_draft_config
from unispec.checkpoints.draft_kinds import check_draft_files
from unispec.checkpoints.gguf_agreement import check_agreement
from unispec.checkpoints.gguf_parts import gguf_among
from unispec.checkpoints.model_config import model_config, read_config_object
from unispec.checkpoints.repository import find_config, resolve_model, weight_files
from unispec.errors import InputError
from unispec.methods import (
    DEFAULT_DRAFT_TOKENS,
    DRAFT_METHODS,
    LARGEST_DRAFT_TOKENS,
    METHODS,
    Method,
)
from unispec.pipelines.architectures.registry import (
    ENGINE_ARCHITECTURES,
    check_pair,
    check_target,
    complete_draft_config,
)

__all__ = ["EngineConfig"]

_MOST_POSITIONS: Final = 2**24
_DraftProposal: TypeAlias = Literal["argmax", "sampled"]

_SIZES: Final = ("max_length", "max_batch_size", "max_batch_input_tokens", "kv_cache_pages")
# What a field holds, in words, its types and the fields; one whose default is None may be that.
_KINDS: Final = (
    ("an integer", (int,), ("num_speculative_tokens", "relaxed_topk", *_SIZES)),
    ("a number", (int, float), ("relaxed_delta",)),
    ("True or False", (bool,), ("enable_prefix_caching", "use_relaxed_acceptance_for_thinking")),
    ("a text", (str,), ("model", "draft_model", "devices", "quantization_encoding")),
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
    """`"dflash"`, `"eagle"` or `"mtp"`; None: the target alone."""
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
    """`"float32"` or `"bfloat16"`; None: float32 on a CPU, bfloat16 on a GPU."""
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
        asked = self.num_speculative_tokens
        if asked is not None and self.speculative_method is None:
            raise InputError(
                f"num_speculative_tokens is {asked}, but there is no speculative method; give one,"
                " or leave it out"
            )
        if asked is not None and self.speculative_method is not None:
            limit = LARGEST_DRAFT_TOKENS[self.speculative_method]
            if not 1 <= asked <= limit:
                raise InputError(f"num_speculative_tokens is {asked}; choose 1 to {limit}")
        if self.draft_proposal not in get_args(_DraftProposal):
            raise InputError(
                f"draft_proposal {self.draft_proposal!r} is unknown; known:"
                f" {', '.join(get_args(_DraftProposal))}"
            )
        if self.use_relaxed_acceptance_for_thinking:
            self._check_relaxed()
        for name in _SIZES:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise InputError(f"{name} is {size}; choose at least 1")

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
        if self.relaxed_topk < 1:
            raise InputError(f"relaxed_topk is {self.relaxed_topk}; choose at least 1")
        if not 0 <= self.relaxed_delta <= 1:
            raise InputError(f"relaxed_delta is {self.relaxed_delta}; choose 0 to 1")
        names = self.thinking_tokens
        are_texts = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
        if not are_texts or len(names) != 2 or names[0] == names[1]:
            raise InputError(
                f"thinking_tokens is {names!r}; give two different tokens, what"
                " opens a block and what closes it"
            )

    def pipeline_config(self, *, weights: bool = True) -> PipelineConfig:
        """MAX's configuration of this engine.

        Args:
            weights: whether it names the weight files, which downloads those of a repository;
                `add_weights` does it later.

        Raises:
            InputError: a model, encoding, device or length that MAX or unispec refuses.
        """
        config = self._without_weights()
        if weights:
            self.add_weights(config)
        return config

    def add_weights(self, config: PipelineConfig) -> None:
        """Names the weight files that have no name there yet, all of them whole.

        Args:
            config: of this engine.

        Raises:
            InputError: a file is missing, damaged or of an unknown format.
        """
        paths = weight_files(self.model, self.weight_path)
        # MAX's configurations are frozen, their lists are not.
        config.model.weight_path[:] = _checked(paths, config.model, self.model)
        draft = config.draft_model
        if draft is not None and draft.weight_path == _places(draft.model_name)["weight_path"]:
            draft.weight_path[:] = self._draft_files(draft)

    def _without_weights(self) -> PipelineConfig:
        device = _device_spec(self.devices)
        encoding = self.quantization_encoding or (
            "float32" if device.device_type == "cpu" else "bfloat16"
        )
        if encoding not in ("float32", "bfloat16"):
            raise InputError(
                f"quantization encoding {encoding!r} is not supported; use 'float32' or 'bfloat16'"
            )
        if encoding == "bfloat16" and not supported_encoding_supported_on("bfloat16", device):
            raise InputError(
                f"quantization encoding 'bfloat16' does not run on devices {self.devices!r}; use"
                " 'float32' or a GPU"
            )
        model = str(resolve_model(self.model))
        keys = read_config_object(model)
        check_pair(keys.get("model_type"), self.speculative_method, source=model)
        stated = model_config(keys, model)
        check_target(stated, source=model)
        limit = getattr(stated.get_text_config(), "max_position_embeddings", None)
        if self.max_length is not None and limit is not None and self.max_length > limit:
            raise InputError(
                f"max_length {self.max_length} is beyond the model's max_position_embeddings"
                f" {limit}; choose at most {limit}"
            )
        longest = self.max_length or limit
        if longest is not None and longest > _MOST_POSITIONS:
            raise InputError(
                f"max_position_embeddings {limit} of {self.model} is beyond the {_MOST_POSITIONS}"
                f" positions that float32 tells apart; give a max_length of at most"
                f" {_MOST_POSITIONS}"
            )
        shared: dict[str, Any] = {
            "device_specs": [device],
            "quantization_encoding": encoding,
            "kv_cache": KVCacheConfig(enable_prefix_caching=self.enable_prefix_caching),
        }
        speculative = None
        draft: MAXModelConfig | None = None
        draft_files: list[Path] = []
        try:
            if self.speculative_method is not None:
                default = DEFAULT_DRAFT_TOKENS[self.speculative_method]
                speculative = SpeculativeConfig(
                    speculative_method=self.speculative_method,
                    num_speculative_tokens=self.num_speculative_tokens or default,
                    draft_proposal=self.draft_proposal,
                    use_relaxed_acceptance_for_thinking=self.use_relaxed_acceptance_for_thinking,
                    relaxed_topk=self.relaxed_topk,
                    relaxed_delta=self.relaxed_delta,
                )
            if self.draft_model is not None and self.speculative_method is not None:
                draft, draft_files = self._draft(self.draft_model, self.speculative_method, shared)
            arguments = PipelineArgs(
                **_places(self.model),
                max_length=self.max_length,
                runtime=PipelineRuntimeConfig(
                    custom_architectures=ENGINE_ARCHITECTURES,
                    max_batch_size=self.max_batch_size,
                    max_batch_input_tokens=self.max_batch_input_tokens,
                ),
                speculative=speculative,
                draft_model=draft,
                **shared,
            )
            config = PipelineConfig.from_args(arguments)
            if config.draft_model is not None and draft_files:
                config.draft_model.weight_path[:] = draft_files
            # MAX renames the target after its draft, in an object that it keeps for the process.
            config.model.huggingface_config.architectures = stated.architectures
            return config
        except InputError:
            raise
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{first['loc'][-1] if first['loc'] else 'the options'} {first['input']!r:.100}"
            raise _refused(model, what, first["msg"]) from error
        except (ValueError, OSError) as error:
            raise _refused(model, "these options", str(error)) from error

    def _draft(
        self, model: str, method: Method, shared: dict[str, Any]
    ) -> tuple[MAXModelConfig, list[Path]]:
        """The draft's configuration, and its weight files; none if they are not there yet."""
        place = resolve_model(model)
        source = str(place)
        stated = read_draft_config(source, method)
        config = MAXModelConfig(**_places(model), **shared)
        adopt(config.huggingface_config, stated)
        # What the files hold says better what the draft is than what config.json lacks.
        files = self._draft_files(config) if isinstance(place, Path) else []
        complete_draft_config(
            method, config.huggingface_config, self.num_speculative_tokens, source=source
        )
        return config, files

    def _draft_files(self, config: MAXModelConfig) -> list[Path]:
        """The draft's weight files, which are whole and hold a draft of the method."""
        assert self.draft_model is not None and self.speculative_method is not None
        paths = weight_files(self.draft_model)
        check_draft_files(self.speculative_method, paths, source=self.draft_model)
        return _checked(paths, config, self.draft_model)


def _refused(model: str, what: str, reason: str) -> InputError:
    """What to say of a value that only MAX knows to be wrong."""
    return InputError(
        f"{model} cannot run with {what}, which MAX refuses ({' '.join(reason.split())}); leave the"
        " option out, or use the checkpoint's own config.json"
    )


def _device_spec(devices: str) -> DeviceSpec:
    kind, _, number = devices.partition(":")
    if kind == "cpu" and not number:
        return DeviceSpec(id=0, device_type="cpu")
    if kind != "gpu" or (number and not number.isdecimal()):
        raise InputError(f"devices {devices!r} is not understood; use 'cpu', 'gpu' or 'gpu:N'")
    index, count = int(number or 0), accelerator_count()
    if index >= count:
        raise InputError(
            f"devices {devices!r} is not there, MAX finds {count} GPUs on this machine; use 'cpu'"
            + (f" or 'gpu:0' to 'gpu:{count - 1}'" if count else "")
        )
    return DeviceSpec(id=index, device_type="gpu")


def _places(model: str) -> dict[str, Any]:
    """Where MAX finds a model, which it calls as the user does.

    MAX guesses a number format from the names of weight files: it sees another file until all of
    its decisions are made, and ours depend on what is in the files.
    """
    config = find_config(model)
    folder = str(config.parent)
    return {"model_path": folder, "weight_path": [config], "served_model_name": model}


def _checked(paths: list[Path], model: MAXModelConfig, source: str) -> list[Path]:
    """The weight files, all of them whole and in agreement with config.json."""
    check_weight_files(paths)
    if gguf := gguf_among(paths):
        check_agreement(gguf, model.huggingface_config, source=source)
    return paths
