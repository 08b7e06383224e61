"""What MAX's commands build of our architectures, up to the compilation; prints it as JSON.

A process of its own: MAX's registry and virtual devices are settings of the process. Arguments are
"cpu" or the API and the architecture of a GPU that is not there, such as "cuda:sm_90a", and JSON:
by name target, draft, method, K and number format.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from graph_texts import Built, nothing_compiled
from max.driver import (
    DeviceSpec,
    set_virtual_device_api,
    set_virtual_device_count,
    set_virtual_device_target_arch,
)
from max.engine import InferenceSession
from max.pipelines.lib import (
    PIPELINE_REGISTRY,
    MAXModelConfig,
    PipelineArgs,
    PipelineConfig,
    PipelineRuntimeConfig,
)
from max.pipelines.speculative import SpeculativeConfig


def factory(device: DeviceSpec, asked: list[Any]) -> Any:
    """As `max generate` and the model worker of `max serve` get it."""
    target, draft, method, count, encoding = asked
    shared: dict[str, Any] = {"device_specs": [device], "quantization_encoding": encoding}
    config = PipelineConfig.from_args(
        PipelineArgs(
            model_path=target,
            draft_model=MAXModelConfig(model_path=draft, **shared) if draft else None,
            speculative=SpeculativeConfig(speculative_method=method, num_speculative_tokens=count),
            runtime=PipelineRuntimeConfig(
                custom_architectures=["unispec.pipelines.architectures"], max_batch_size=4
            ),
            **shared,
        )
    )
    return PIPELINE_REGISTRY.retrieve_factory(config).factory


def built(device: DeviceSpec, asked: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        make = factory(device, asked)
        found["pipeline"] = make.func.__name__
        with nothing_compiled():
            make()
    except Built as graph:
        found["is_eagle3"] = "draft.layers.0.hidden_norm.weight" in graph.weights
        found["on_gpu"] = "gpu:0" in graph.text
    except ValueError as error:
        found["refused"] = str(error)
    return found


def allocated(device: DeviceSpec, asked: list[Any]) -> str:
    """The manager of cache pages after a graph is compiled."""
    compiled = SimpleNamespace(output_metadata=(None,) * 3)
    InferenceSession.load = lambda *_, **__: compiled  # type: ignore[assignment, method-assign]
    return type(factory(device, asked)().kv_manager).__name__


where, pairs = sys.argv[1], json.loads(sys.argv[2])
spec = DeviceSpec.cpu()
if where != "cpu":
    api, _, arch = where.partition(":")
    set_virtual_device_api(api)
    set_virtual_device_target_arch(arch)
    set_virtual_device_count(1)
    spec = DeviceSpec.accelerator()
results: dict[str, Any] = {name: built(spec, asked) for name, asked in pairs.items()}
if where != "cpu":
    results["manager"] = allocated(spec, pairs[next(iter(pairs))])
print(json.dumps(results))
