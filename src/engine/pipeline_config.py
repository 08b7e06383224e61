"""MAX's configuration of an engine, made of what the user states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from max.driver import DeviceSpec, accelerator_count
from max.pipelines.lib import (
    KVCacheConfig,
    MAXModelConfig,
    PipelineArgs,
    PipelineConfig,
    PipelineRuntimeConfig,
)
from max.pipelines.speculative import SpeculativeConfig
from pydantic import ValidationError

from unispec.checkpoints.draft_config import adopt, read_draft_config
from unispec.checkpoints.draft_kinds import tensor_shapes
from unispec.checkpoints.model_config import model_config, read_config_object
from unispec.checkpoints.repository import resolve_model
from unispec.encodings import (
    BFLOAT16,
    BLOCK_ENCODINGS,
    DRAFT_ENCODINGS,
    FLOAT32,
    FP8,
    WeightEncodings,
)
from unispec.errors import InputError
from unispec.methods import DRAFTLESS, FACTS, Method
from unispec.pipelines.architectures.registry import (
    ENGINE_ARCHITECTURES,
    check_target,
    find,
)
from unispec.pipelines.runtime.compiled import check_compiled
from unispec.pipelines.runtime.lengths import longest_sequence
from unispec.pipelines.unified.method import DraftMethod
from unispec.pipelines.unified.target import TargetFamily

from .config import EngineConfig
from .model_files import add_weights, draft_files, draft_paths, drafted_method, location

__all__ = ["make_pipeline_config", "weight_encodings"]


def make_pipeline_config(config: EngineConfig, *, weights: bool = True) -> PipelineConfig:
    """MAX's configuration of an engine.

    Args:
        weights: whether it names the weight files, which downloads those of a repository;
            `add_weights` does it later.

    Raises:
        InputError: a model, encoding, device or length that MAX or unispec refuses, or a folder
            without a compiled graph of this version and for this processor.
    """
    device = _device_spec(config.devices)
    if config.compiled is not None:
        check_compiled(config.compiled)
    model = str(resolve_model(config.model))
    keys = read_config_object(model)
    paths = draft_paths(config)
    method = drafted_method(config, paths)
    with_draft = None if method in DRAFTLESS else method
    pair = find(keys.get("model_type"), with_draft, source=model)
    hf_config = model_config(keys, model)
    check_target(pair.family, hf_config, source=model)
    longest_sequence(hf_config, config.max_length, source=config.model)
    shared: dict[str, Any] = {
        "device_specs": [device],
        "quantization_encoding": _encoding(config, pair.family, device),
        "kv_cache": KVCacheConfig(enable_prefix_caching=config.enable_prefix_caching),
    }
    draft: MAXModelConfig | None = None
    files: list[Path] = []
    try:
        if config.draft_model is not None and pair.method is not None:
            draft, files = _draft(config, pair.method, shared, paths)
        arguments = PipelineArgs(
            **location(config.model),
            max_length=config.max_length,
            runtime=PipelineRuntimeConfig(
                custom_architectures=ENGINE_ARCHITECTURES,
                max_batch_size=config.max_batch_size,
                max_batch_input_tokens=config.max_batch_input_tokens,
            ),
            speculative=_speculative(config, with_draft),
            draft_model=draft,
            **shared,
        )
        made = PipelineConfig.from_args(arguments)
    except InputError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{first['loc'][-1] if first['loc'] else 'the options'} {first['input']!r:.100}"
        raise _refused(model, what, first["msg"]) from error
    except (ValueError, OSError) as error:
        raise _refused(model, "these options", str(error)) from error
    if made.draft_model is not None and files:
        made.draft_model.weight_path[:] = files
    if weights:
        add_weights(made, config)
    return made


def weight_encodings(config: EngineConfig) -> WeightEncodings:
    """How matrices are stored: on a CPU as asked, on a GPU in what is computed in."""
    if config.devices != "cpu":
        return WeightEncodings()
    return WeightEncodings(config.quantization_encoding, config.draft_quantization_encoding)


def _encoding(config: EngineConfig, family: TargetFamily, device: DeviceSpec) -> str:
    """The number format to compute in, which the target's own configuration decides."""
    encoding, on_cpu = config.quantization_encoding, device.device_type == "cpu"
    if on_cpu and family.config.KEEPS_FORMS:
        if encoding not in (None, *DRAFT_ENCODINGS):
            raise InputError(
                f"quantization encoding {encoding!r} is not supported on a CPU; use"
                f" {' or '.join(map(repr, DRAFT_ENCODINGS))}"
            )
        return FLOAT32
    if encoding in BLOCK_ENCODINGS:
        where = f"for a {family.model_type}" if on_cpu else "on a GPU"
        raise InputError(
            f"quantization encoding {encoding!r} is not supported {where}; leave it out, or run a"
            " Llama or one of its relatives on a CPU"
        )
    requested: dict[str, Any] = {"quantization_encoding": encoding}
    chosen: str = family.config.choose_encoding(
        MAXModelConfig(**location(config.model), device_specs=[device], **requested)
    )
    return chosen


def _speculative(config: EngineConfig, method: Method | None) -> SpeculativeConfig | None:
    if method is None:
        return None
    return SpeculativeConfig(
        speculative_method=FACTS[method].max_method,
        num_speculative_tokens=config.largest_draft_count,
        draft_proposal=config.draft_proposal,
        use_relaxed_acceptance_for_thinking=config.use_relaxed_acceptance_for_thinking,
        relaxed_topk=config.relaxed_topk,
        relaxed_delta=config.relaxed_delta,
        synthetic_acceptance_rate=config.synthetic_acceptance_rate,
    )


def _draft(
    config: EngineConfig,
    method: DraftMethod,
    shared: dict[str, Any],
    paths: list[Path] | None,
) -> tuple[MAXModelConfig, list[Path]]:
    """The draft's configuration, and its weight files; none if they are not there yet."""
    assert config.draft_model is not None
    resolved = resolve_model(config.draft_model)
    source = str(resolved)
    shapes = None if paths is None else tensor_shapes(paths)
    hf_config = read_draft_config(source, method.name, shapes)
    if shared["quantization_encoding"] == FP8:
        # A draft is not quantised with its target.
        shared = {**shared, "quantization_encoding": BFLOAT16}
    draft = MAXModelConfig(**location(config.draft_model), **shared)
    adopt(draft.huggingface_config, hf_config)
    # What the files hold says better what the draft is than what config.json lacks.
    files = draft_files(draft, config, paths) if isinstance(resolved, Path) else []
    count = config.num_speculative_tokens
    asked = count if isinstance(count, int) else None
    method.prepare(draft.huggingface_config, asked, source=source)
    return draft, files


def _refused(model: str, what: str, reason: str) -> InputError:
    """What to say of a value that only MAX knows to be wrong."""
    return InputError(
        f"{model} cannot run with {what}, which MAX refuses ({' '.join(reason.split())}); leave the"
        " option out, or use the checkpoint's own config.json"
    )


def _device_spec(devices: str) -> DeviceSpec:
    kind, _, number = devices.partition(":")
    if devices == "cpu":
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
