"""What crosses between the API process and the model worker arrives as it was sent."""

from __future__ import annotations

import pickle
import queue
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from max.pipelines.context import (
    EOSTracker,
    GenerationStatus,
    SamplingParams,
    TextContext,
    TextGenerationOutput,
    TokenBuffer,
)
from max.pipelines.request import RequestID
from max.serve.scheduler_result import SchedulerResult
from max.serve.worker_interface._zmq_queue import ZmqConfig
from tiny import TinyPair

from unispec.engine import EngineConfig
from unispec.engine.served_config import Served, served_pipeline
from unispec.pipelines.served.context import ServedContext
from unispec.pipelines.served.output import ServedOutput


def sent(value: Any, payload_type: Any) -> Any:
    """A value through MAX's own queue, read as this type."""
    push, pull = ZmqConfig[Any](payload_type).pair()
    until_done(lambda: push.put_nowait(value))
    return until_done(pull.get_nowait)


def until_done(work: Callable[[], Any]) -> Any:
    """Tries again while the two ends are not connected yet, or nothing has arrived."""
    for _ in range(1000):
        try:
            return work()
        except (queue.Empty, zmq.Again):
            time.sleep(0.01)
    raise AssertionError("nothing arrives")


def context(**fields_: Any) -> TextContext:
    return TextContext(
        max_length=40,
        tokens=TokenBuffer(np.array([3, 1, 4], np.int64)),
        eos_tracker=EOSTracker(eos_token_ids={2}, eos_stop_strings=["end"]),
        sampling_params=SamplingParams(seed=2**63, temperature=0.5, stop_token_ids=[7]),
        **fields_,
    )


def test_a_context_keeps_all_fields() -> None:
    plain = context(json_schema="{}", vocab_size=256, cache_salt="a")
    made = ServedContext.of(plain, logit_bias={3: -1.5}, model_name="m")
    for field in fields(TextContext):
        expected = "m" if field.name == "model_name" else getattr(plain, field.name)
        assert getattr(made, field.name) is expected or getattr(made, field.name) == expected
    assert made.logit_bias == {3: -1.5}


def test_a_context_arrives() -> None:
    made = ServedContext.of(context(grammar="[a-z]+"), logit_bias={3: -1.5, 250: 100.0})
    arrived = sent(made, ServedContext)
    assert type(arrived) is ServedContext
    assert arrived.logit_bias == {3: -1.5, 250: 100.0}
    assert arrived.tokens.all.tolist() == [3, 1, 4]
    assert (arrived.grammar, arrived.request_id) == ("[a-z]+", made.request_id)
    assert arrived.sampling_params == made.sampling_params
    assert arrived.eos_tracker == made.eos_tracker


def output() -> ServedOutput:
    return ServedOutput(
        request_id=RequestID(),
        tokens=[5, 6],
        final_status=GenerationStatus.ACTIVE,
        drafted=3,
        accepted=1,
    )


def test_an_output_arrives() -> None:
    made = {RequestID(): SchedulerResult.create(output())}
    arrived = sent(made, dict[RequestID, SchedulerResult[ServedOutput]])
    assert arrived == made


def test_max_s_decoder_ignores_what_it_does_not_know() -> None:
    made = output()
    plain = dict[RequestID, SchedulerResult[TextGenerationOutput]]
    arrived = sent({made.request_id: SchedulerResult.create(made)}, plain)
    result = arrived[made.request_id].result
    assert type(result) is TextGenerationOutput
    assert result.tokens == [5, 6]


WORKER = """
import pickle, sys
factory, tokenizer = pickle.loads(open(sys.argv[1], "rb").read())
keywords = factory.keywords
config = keywords["pipeline_config"]
keywords["pipeline_model"].model_config_cls.initialize(config, max_seq_len=256).get_kv_params()
print(keywords["pipeline_model"].__name__, factory.func.__name__, tokenizer.vocab_size,
      type(config.model.huggingface_config).__name__, sorted(tokenizer.eos_token_ids))
"""


def served(pair: TinyPair) -> Served:
    return served_pipeline(
        EngineConfig(
            model=str(pair.target),
            draft_model=None if pair.draft is None else str(pair.draft),
            speculative_method=pair.method,
            draft_proposal=pair.draft_proposal,
            max_length=256,
        )
    )


@pytest.mark.parametrize("name", ["llama_eagle_agreeing", "qwen2_eagle", "kimi_dflash"])
def test_a_worker_reads_the_factory(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, name: str
) -> None:
    """A process that knows nothing: a composed class, and Kimi's configuration, too."""
    made = served(tiny_pair(name))
    file = tmp_path / "factory"
    file.write_bytes(pickle.dumps((made.factory, made.tokenizer)))
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tokenizer = made.tokenizer
    model = tokenizer._model.__name__
    assert done.stdout.split()[:3] == [model, "ServedPipeline", str(tokenizer.vocab_size)]
