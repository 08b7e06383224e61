"""Builds the DeepSeek-V3 graphs for GPUs that are not there, and prints what they are as JSON.

A process of its own: virtual devices are a setting of the process. With `--compile` the unified
graph is compiled for them too, which takes ten minutes and no test does.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graph_texts import describe, weight_type
from max.driver import (
    DeviceSpec,
    load_devices,
    set_virtual_device_api,
    set_virtual_device_count,
    set_virtual_device_target_arch,
)
from max.engine import InferenceSession
from max.graph import Graph, TensorValue, Type, Weight
from max.pipelines.lib import PipelineConfig

from unispec.checkpoints.tied_head import HEAD
from unispec.engine import EngineConfig
from unispec.engine.pipeline_config import make_pipeline_config
from unispec.pipelines.architectures.unified_mtp_deepseekV3 import (
    UnifiedMTPDeepseekV3Config,
    UnifiedMTPDeepseekV3Inputs,
)
from unispec.pipelines.drafts.mtp.method import MTP
from unispec.pipelines.targets.deepseek import DEEPSEEK_V3
from unispec.pipelines.targets.deepseek.config import DeepseekV3Config
from unispec.pipelines.unified.graph import UnifiedStep, build_graph
from unispec.pipelines.unified.weights import load_weights

MASK_STEP = re.compile(
    r"(%\w+(?:, %\w+)*)(?::\d+)? = "
    r"(mo\.call (?=@target)|rmo\.mo\.mutable\.load|mo\.custom (?=\[symbol = \"mo\."
    r"(?:wait_host_value_with_dep|inplace_memcpy|apply_packed_bitmask)))"
    r"(?:@\S+?|\[symbol = \"mo\.(\w+)\".*?\])?\((.*?)\)"
)
"""What masks come through, in order: results, operation, kernel, operands."""


def main(
    count: int,
    folder: Path,
    parallelism: str,
    arch: str,
    *,
    late_masks: bool,
    texts: Path | None,
    compiles: bool,
) -> None:
    set_virtual_device_api("cuda")
    set_virtual_device_target_arch(arch)
    set_virtual_device_count(count)
    engine = make_pipeline_config(
        EngineConfig(model=str(folder), max_length=64, speculative_method="mtp", devices="gpu")
    )
    gpus = [DeviceSpec(id=index, device_type="gpu") for index in range(count)]
    replicas = count if parallelism == "expert" else 1
    engine = with_devices(engine, gpus, replicas)
    config = replace(UnifiedMTPDeepseekV3Config.initialize(engine), late_masks=late_masks)
    checkpoint = DEEPSEEK_V3.read(engine.model, config.target)
    target = DEEPSEEK_V3.state(checkpoint.tensors, config.target, source="tiny")
    config.target.tie_word_embeddings = HEAD not in target
    draft = MTP.state(checkpoint, config, target)
    state = {f"target.{name}": tensor for name, tensor in target.items()}
    alone = UnifiedStep(plain_config(folder, gpus, replicas), DEEPSEEK_V3, None)
    alone.config.tie_word_embeddings = config.target.tie_word_embeddings
    load_weights(alone, state)
    unified = UnifiedStep(config, DEEPSEEK_V3, MTP, UnifiedMTPDeepseekV3Inputs)
    load_weights(unified, state | {f"draft.{n}": tensor for n, tensor in draft.state.items()})
    built = build_graph(unified)
    if compiles:
        began = time.monotonic()
        InferenceSession(devices=load_devices(gpus)).compile(built)
        print(f"compiled in {time.monotonic() - began:.0f} s", file=sys.stderr)
    built_alone = build_graph(alone)
    recorded = {}
    for name, one, module in (("unified", built, unified), ("alone", built_alone, alone)):
        text = str(one.module.mlir_module)
        weights = {key: weight_type(weight) for key, weight in sorted(module.state_dict().items())}
        recorded[name] = describe(text, weights)
        if texts is not None:
            (texts / f"{name}.txt").write_text(text)
            (texts / f"{name}.json").write_text(json.dumps(weights))
    # What a graph puts out is verified with all that it is made of.
    print(
        json.dumps(
            {
                "recorded": recorded,
                "unified": described(built),
                "alone": described(built_alone),
                # Types only: MAX casts no values where devices are virtual.
                "weights": {
                    name: [weight.dtype.name, list(weight.shape)]
                    for name, weight in unified.state_dict().items()
                },
                "shards": shards(unified.target.layers[1]),
                "scale": unified.target.layers[1].attention[0].scale,
            }
        )
    )


def plain_config(folder: Path, gpus: list[DeviceSpec], replicas: int) -> DeepseekV3Config:
    """Of the target alone."""
    engine = make_pipeline_config(EngineConfig(model=str(folder), max_length=64, devices="gpu"))
    return DeepseekV3Config.initialize(with_devices(engine, gpus, replicas))


def with_devices(
    config: PipelineConfig, devices: list[DeviceSpec], replicas: int
) -> PipelineConfig:
    """On several devices, each of which has some experts if there are several replicas."""
    changed = {
        "device_specs": devices,
        "data_parallel_degree": replicas,
        "quantization_encoding": None,
    }
    model = config.model.model_copy(update=changed)
    runtime = config.runtime.model_copy(update={"ep_size": replicas})
    return config.model_copy(
        update={"models": {**config.models, "main": model}, "runtime": runtime}
    )


def described(built: Graph) -> dict[str, Any]:
    text = str(built)
    return {
        "inputs": types(value.type for value in built.inputs),
        "outputs": types(built.output_types),
        "collectives": {
            name: text.count(f"mo.distributed.{name}")
            for name in ("allreduce.sum", "allgather", "broadcast", "ep.dispatch", "ep.combine")
        },
        "masks": MASK_STEP.findall(text),
    }


def types(found: Any) -> list[Any]:
    def described_type(one: Type[Any]) -> Any:
        value: Any = one
        kind = type(value).__name__
        return [kind, value.dtype.name, [str(dim) for dim in value.shape], str(value.device)]

    return [described_type(one) for one in found]


def shards(layer: Any) -> dict[str, Any]:
    """Shapes of what each device has of one layer's weights."""
    with Graph("shapes", input_types=[]):
        return {
            name: [[int(size) for size in TensorValue(weight).shape] for weight in weights]
            for name, weights in weights_by_device(layer).items()
        }


def weights_by_device(layer: Any) -> dict[str, Sequence[Weight]]:
    attention, mlps = layer.attention, layer.mlps
    return {
        "query": [one.q_b_proj if one.q_lora_rank else one.q_proj for one in attention],
        "kv_b_proj": [one.kv_b_proj for one in attention],
        "kv_a_proj_with_mqa": [one.kv_a_proj_with_mqa for one in attention],
        "o_proj": [one.o_proj.weight for one in attention],
        "gate": [one.gate.weight for one in mlps],
        "gate_up_proj": [one.gate_up_proj for one in mlps],
        "down_proj": [one.down_proj for one in mlps],
        "shared up_proj": [one.shared_experts.up_proj.weight for one in mlps],
    }


parser = argparse.ArgumentParser()
parser.add_argument("count", type=int, help="how many GPUs")
parser.add_argument("folder", type=Path, help="of a checkpoint")
parser.add_argument("parallelism", choices=["tensor", "expert"], help="how the GPUs share it")
parser.add_argument("--arch", default="sm_100a", help="of the GPUs")
parser.add_argument("--late-masks", action="store_true", help="as `LATE_MASKS` says")
parser.add_argument("--texts", type=Path, help="a folder for the graphs' texts")
parser.add_argument("--compile", action="store_true", dest="compiles")
main(**vars(parser.parse_args()))
