"""What the server needs of MAX beyond its public API: which name moved, if one did.

Written against max 26.7.0; the users are `pipelines/served/max_serving.py` and, of what is in
`max.serve`, `serving/max_server.py`.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from max.pipelines.context import TextContext, TextGenerationOutput
from max.pipelines.lib import PIPELINE_REGISTRY, SupportedArchitecture, TextTokenizer

SIGNATURES = {
    "max.pipelines.lib.pipeline_variants.utils.StructuredOutputHelper.build_matcher": (
        "self",
        "grammar",
        "json_schema",
    ),
    "max.pipelines.lib.pipeline_variants.utils.StructuredOutputHelper.install_matcher": (
        "self",
        "context",
        "matcher",
    ),
    "max.pipelines.lib.pipeline_variants.utils.get_structured_output_helper": ("pipeline",),
    "max.pipelines.context.TextContext.set_matcher": ("self", "matcher"),
    "max._entrypoints.cli.generate.TrackMetrics.__call__": ("self", "inputs"),
    "max.serve.scheduler.batch_constructor.grammar_gate.AsyncGrammarGate.create": ("pipeline",),
    "max.serve.pipelines.model_worker.start_model_worker": (
        "model_factory",
        "pipeline_config",
        "settings",
        "metric_client",
        "model_worker_interface",
        "zmq_endpoint_base",
        "memory_plan",
    ),
    "max.serve.telemetry.process_controller.start_process_consumer": ("settings", "handle_fn"),
    "max.serve.worker_interface.zmq_interface.ZmqModelWorkerInterface": (
        "pipeline_task",
        "context_type",
        "request_queue_size",
    ),
    "max.serve.worker_interface._zmq_queue.ZmqConfig": ("payload_type", "high_water_mark"),
    "max.serve.worker_interface._zmq_queue.generate_zmq_ipc_path": (),
    "max.serve.worker_interface.zmq_interface.ZmqModelWorkerProxy.stream": (
        "self",
        "req_id",
        "data",
    ),
    "max.serve.worker_interface.zmq_interface.ZmqModelWorkerProxy.cancel": ("self", "req_id"),
    "max.serve.worker_interface.ModelWorkerProxy.note_awaiting_admission": ("self", "delta"),
    "max.serve.scheduler_result.SchedulerResult.cancelled": (),
    "max.serve.process_control.SubprocessExit": ("info",),
}
"""Functions by their path, and their parameters; of `install_matcher` the names may differ."""

FIELDS = {
    "max.pipelines.lib.pipeline_variants.utils.StructuredOutputHelper": {
        "enabled",
        "enable_response_format_schema",
        "backend",
    },
    "max.pipelines.speculative.utils._SpeculativeDecodingMetrics": {
        "num_speculative_tokens",
        "accepted_per_position",
        "num_verifications",
    },
}
"""Dataclasses by their path, and fields that are given or read."""


def found(path: str) -> Any:
    """What a dotted path names; the longest importable part is a module."""
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            assert hasattr(value, name), f"{path} moved: {value!r} has no {name}"
            value = getattr(value, name)
        return value
    raise AssertionError(f"{path} moved: there is no such module")


@pytest.mark.parametrize(("path", "names"), SIGNATURES.items())
def test_functions_take_what_they_are_given(path: str, names: tuple[str, ...]) -> None:
    parameters = tuple(inspect.signature(found(path)).parameters)
    assert len(parameters) == len(names), f"{path} takes {parameters}"
    if not path.endswith("install_matcher"):
        assert parameters == names


@pytest.mark.parametrize(("path", "names"), FIELDS.items())
def test_dataclasses_have_these_fields(path: str, names: set[str]) -> None:
    cls = found(path)
    assert is_dataclass(cls)
    assert names <= {field.name for field in fields(cls)}


def test_the_registry_builds_the_pipeline_of_an_entry() -> None:
    names = {field.name for field in fields(SupportedArchitecture)}
    assert {"pipeline_cls", "tokenizer", "context_type", "memory_planner"} <= names
    source = inspect.getsource(type(PIPELINE_REGISTRY).retrieve_factory)
    for name in (
        '"pipeline_config"',
        '"pipeline_model"',
        '"weight_adapters"',
        '"tokenizer"',
        '"memory_plan"',
    ):
        assert name in source, f"retrieve_factory gives no {name}"
    assert "arch.pipeline_cls" in source


def test_the_scheduler_releases_what_it_preempts() -> None:
    constructor = found(
        "max.serve.scheduler.batch_constructor.text_batch_constructor.TextBatchConstructor"
    )
    source = inspect.getsource(constructor._return_to_request_queue)
    assert source.index("self.pipeline.release(") < source.index("context.reset()")


def test_the_scheduler_asks_for_these_names() -> None:
    module = found("max.serve.scheduler.text_generation_scheduler")
    assert "batch_spec_decode_metrics" in inspect.getsource(module)
    helper = found("max.pipelines.lib.pipeline_variants.utils.get_structured_output_helper")
    assert '"_structured_output"' in inspect.getsource(helper)


def test_contexts_and_outputs_are_dataclasses_to_derive_from() -> None:
    for cls in (TextContext, TextGenerationOutput):
        assert is_dataclass(cls)
        assert all(field.init for field in fields(cls))
    assert {"json_schema", "grammar", "sampling_params", "eos_tracker", "max_length"} <= {
        field.name for field in fields(TextContext)
    }


def test_the_base_of_the_tokenizer_keeps_its_methods() -> None:
    """`max generate` asks for a `TextTokenizer`; ours answers with these methods of its own."""
    for name in (
        "apply_chat_template",
        "create_eos_tracker",
        "decode",
        "encode",
        "eos_token_ids",
        "new_context",
        "tokenizer_vocab_size",
    ):
        assert hasattr(TextTokenizer, name), f"TextTokenizer.{name} moved"


def test_the_server_has_these_settings() -> None:
    aliases = {field.alias for field in found("max.serve.config.Settings").model_fields.values()}
    assert {
        "MAX_SERVE_HOST",
        "MAX_SERVE_METRICS_ENDPOINT_PORT",
        "MAX_SERVE_METRIC_RECORDING_METHOD",
        "MAX_SERVE_MW_TIMEOUT",
        "MAX_SERVE_LOGS_ENABLE_COMPONENTS",
        "MAX_SERVE_LOGS_CONSOLE_LEVEL",
    } <= aliases


def test_the_way_to_the_worker_has_these_parts() -> None:
    source = inspect.getsource(
        found("max.serve.worker_interface.zmq_interface.ZmqModelWorkerInterface")
    )
    assert "self.response_queue_config" in source
    proxy = inspect.getsource(found("max.serve.worker_interface.zmq_interface.ZmqModelWorkerProxy"))
    assert "self.pending_out_queues" in proxy
    assert "enqueue_s, item = await queue.get()" in proxy


def test_metrics_have_these_names() -> None:
    metrics = found("max.serve.telemetry.metrics.METRICS")
    for name in (
        "configure",
        "input_time",
        "input_tokens",
        "itl",
        "output_tokens",
        "reqs_running",
        "request_count",
        "request_time",
        "time_per_output_token",
        "ttft",
    ):
        assert hasattr(metrics, name), f"METRICS.{name} moved"
