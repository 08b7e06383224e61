"""Which model runs, with which draft, where and how large."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from unispec.batch_schedule import BatchSchedule
from unispec.commands.options import option_group
from unispec.encodings import DRAFT_ENCODINGS, ENCODINGS
from unispec.errors import InputError
from unispec.methods import (
    AUTO,
    DRAFT_METHODS,
    DRAFTLESS,
    METHODS,
    Method,
    check_num_speculative_tokens,
)
from unispec.pipelines.lookup.options import DEFAULT_LOOKUP_MAX, DEFAULT_LOOKUP_MIN

if TYPE_CHECKING:
    from unispec.engine import EngineConfig

__all__ = ["ModelOptions", "compiled_option", "model_options"]

DEFAULT_MAX_BATCH_SIZE = 8


class Devices(click.ParamType[str]):
    """`cpu`, `gpu` or `gpu:ID`."""

    name = "devices"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the name as it stands; fails if it names no device."""
        if re.fullmatch(r"cpu|gpu(:\d+)?", value) is None:
            self.fail(f"'{value}' is not 'cpu', 'gpu' or 'gpu:ID'.", param, ctx)
        return str(value)


class DraftTokens(click.ParamType[Any]):
    """A positive integer or `auto`."""

    name = "integer or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns either; fails of anything else."""
        if value == AUTO or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        if not str(value).isdecimal() or not int(value):
            self.fail(f"'{value}' is neither a positive integer nor 'auto'.", param, ctx)
        return int(value)


class Schedule(click.ParamType[BatchSchedule]):
    """Ranges of batch sizes as JSON."""

    name = "json"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> BatchSchedule:
        """Returns the schedule; fails where it is none."""
        try:
            ranges = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            self.fail(
                f"'{value}' is no JSON; give a list such as [[1, 4, 3], [5, 8, 1]].", param, ctx
            )
        try:
            return BatchSchedule.read(ranges)
        except InputError as error:
            self.fail(str(error), param, ctx)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model as the user gives it; None stands for the engine's choice."""

    model: str
    weight_path: tuple[Path, ...]
    quantization_encoding: str | None
    draft_quantization_encoding: str | None
    draft_model_path: str | None
    speculative_method: Method | None
    num_speculative_tokens: int | Literal["auto"] | None
    num_speculative_tokens_per_batch_size: BatchSchedule | None
    prompt_lookup_min: int
    prompt_lookup_max: int | None
    prompt_lookup_store: int
    no_speculation: bool
    devices: str
    max_length: int | None
    max_batch_size: int | None
    max_batch_input_tokens: int
    kv_cache_pages: int | None
    enable_prefix_caching: bool
    device_graph_capture: bool

    def __post_init__(self) -> None:
        """Raises `click.UsageError` for a draft that is only half described, `InputError` for K."""
        if self.no_speculation:
            return
        method, draft = self.speculative_method, self.draft_model_path
        if method in DRAFT_METHODS and draft is None:
            raise click.UsageError(
                f"--speculative-method {method} needs a draft; give --draft-model-path"
            )
        if draft is not None and method is None:
            raise click.UsageError(
                f"--draft-model-path {draft} needs its method; "
                f"give --speculative-method ({', '.join(DRAFT_METHODS)})"
            )
        if draft is not None and method in DRAFTLESS:
            raise click.UsageError(
                f"--draft-model-path {draft} is given, but {method} has no draft; give the draft's "
                "own method, which looks up n-grams, too"
            )
        if draft is not None and method not in DRAFT_METHODS:
            raise click.UsageError(
                f"--draft-model-path {draft} is not for {method}, whose draft is part of the "
                "target's checkpoint; leave it out"
            )
        if self.num_speculative_tokens is not None:
            check_num_speculative_tokens(method, self.num_speculative_tokens)

    @property
    def draft(self) -> str | None:
        """The draft that runs."""
        return None if self.no_speculation else self.draft_model_path

    def engine_config(self, num_prompts: int, compiled: Path | None = None) -> EngineConfig:
        """Returns the configuration of an engine for this many prompts.

        Args:
            compiled: folder with the compiled graph; None: it is compiled.
        """
        from unispec.engine import EngineConfig

        speculation: dict[str, Any] = {
            "draft_model": self.draft_model_path,
            "speculative_method": self.speculative_method,
            "num_speculative_tokens": self.num_speculative_tokens,
            "num_speculative_tokens_per_batch_size": self.num_speculative_tokens_per_batch_size,
            "prompt_lookup_min": self.prompt_lookup_min,
            "prompt_lookup_max": self.prompt_lookup_max,
            "prompt_lookup_store": self.prompt_lookup_store,
            "draft_quantization_encoding": self.draft_quantization_encoding,
        }
        return EngineConfig(
            **({} if self.no_speculation else speculation),
            model=self.model,
            weight_path=self.weight_path,
            devices=self.devices,
            max_length=self.max_length,
            max_batch_size=self.max_batch_size or min(num_prompts, DEFAULT_MAX_BATCH_SIZE),
            quantization_encoding=self.quantization_encoding,
            enable_prefix_caching=self.enable_prefix_caching,
            max_batch_input_tokens=self.max_batch_input_tokens,
            kv_cache_pages=self.kv_cache_pages,
            device_graph_capture=self.device_graph_capture,
            compiled=compiled,
        )


model_options = option_group(
    "model",
    ModelOptions,
    click.option(
        "--model",
        "--model-path",
        "model",
        required=True,
        help="The target: a folder with config.json, weights and tokenizer, a GGUF file, or a "
        "Hugging Face repository id.",
    ),
    click.option(
        "--weight-path",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        multiple=True,
        help="Weight files of the target (safetensors or one GGUF), instead of those that lie in "
        "the model's folder. Can be given several times.",
    ),
    click.option(
        "--quantization-encoding",
        type=click.Choice(ENCODINGS),
        help="Number format of the target, of those that it supports: on a CPU of its weights, "
        "with float32 for all else.  [default: on a CPU as the checkpoint has them; on a GPU "
        "bfloat16, for FP8 blocks float8_e4m3fn where it has that]",
    ),
    click.option(
        "--draft-quantization-encoding",
        type=click.Choice(DRAFT_ENCODINGS),
        help="Number format of the draft's weights on a CPU.  [default: as its checkpoint has "
        "them]",
    ),
    click.option(
        "--draft-model-path",
        metavar="TEXT",
        help="The draft: a folder or a Hugging Face repository id.",
    ),
    click.option(
        "--speculative-method",
        type=click.Choice(METHODS),
        help="What kind of draft it is; eagle stands for EAGLE-3, too, if the draft is that. "
        "ngram needs no draft: it proposes what followed the same words before.",
    ),
    click.option(
        "--num-speculative-tokens",
        type=DraftTokens(),
        help="Tokens that are proposed in a step, or auto: each step chooses what makes the most "
        "tokens a second on this machine.  [default: auto; DFlash proposes its whole block]",
    ),
    click.option(
        "--num-speculative-tokens-per-batch-size",
        type=Schedule(),
        help="Instead: by the number of prompts that run, as [[1, 4, 3], [5, 8, 1]]: 3 tokens "
        "for 1 to 4 prompts, 1 for more.",
    ),
    click.option(
        "--prompt-lookup-min",
        type=click.IntRange(min=1),
        default=DEFAULT_LOOKUP_MIN,
        show_default=True,
        help="Tokens at an answer's end that have to stand before to propose what followed them.",
    ),
    click.option(
        "--prompt-lookup-max",
        type=click.IntRange(min=0),
        help="Most tokens that are compared; 0 looks nothing up.  [default: "
        f"{DEFAULT_LOOKUP_MAX}; 0 with a draft and a number of tokens]",
    ),
    click.option(
        "--prompt-lookup-store",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Tokens of finished answers to look up for later prompts, too.",
    ),
    click.option(
        "--no-speculation",
        is_flag=True,
        help="Run the target alone on the same machinery, whatever draft is given.",
    ),
    click.option(
        "--devices",
        type=Devices(),
        default="cpu",
        show_default=True,
        help="Where to run: cpu, gpu or gpu:ID.",
    ),
    click.option(
        "--max-length",
        type=click.IntRange(min=1),
        help="Most tokens of a prompt and its answer together.  [default: the model's]",
    ),
    click.option(
        "--max-batch-size",
        type=click.IntRange(min=1),
        help=f"Most prompts to run at a time.  [default: all, at most {DEFAULT_MAX_BATCH_SIZE}]",
    ),
    click.option(
        "--max-batch-input-tokens",
        type=click.IntRange(min=1),
        default=512,
        show_default=True,
        help="Most prompt tokens to read in a step; longer prompts are read in chunks.",
    ),
    click.option(
        "--kv-cache-pages",
        type=click.IntRange(min=1),
        help="Pages of the KV cache.  [default: for a full batch of full length, in 4 GiB at most]",
    ),
    click.option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        default=True,
        show_default=True,
        help="Whether prompts with a common prefix share what was computed for it.",
    ),
    click.option(
        "--device-graph-capture",
        is_flag=True,
        help="On a GPU: record decode steps of a kind once, then launch all of a step at once.",
    ),
)
"""Adds the options of `ModelOptions` to a command."""

compiled_option = click.option(
    "--compiled",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder that `unispec compile` has written with the same options: nothing is compiled.",
)
"""Adds where the graph is compiled already."""
