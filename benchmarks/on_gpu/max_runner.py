"""MAX's own unified architecture as a contender, through its in-process API."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from max.pipelines import AutoModel
from max.pipelines.context import SamplingParams, TextContext, TokenBuffer
from max.pipelines.lib import PIPELINE_REGISTRY
from max.pipelines.lib.generate import GenerateIterator

from .contenders import mean_of_runs
from .job import Job
from .steps import Steps, Timed

__all__ = ["MaxRunner", "options"]


class MaxRunner:
    """The pipeline that `max serve` would build for the pair: overlapped, captured where it can be.

    Raises:
        RuntimeError: MAX took another architecture for the pair.
    """

    def __init__(self, job: Job) -> None:
        self._max_length = job.max_length
        self._model = AutoModel(job.target, **options(job))
        config = self._model.pipeline_config
        architecture = PIPELINE_REGISTRY.architecture_for_config(config)
        if architecture is None or not architecture.name.startswith("Unified"):
            raise RuntimeError(f"MAX runs this pair as {architecture}, which is not a unified one")

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timed:
        """Answers encoded prompts greedily."""
        steps = Steps(len(prompts))
        contexts = [
            TextContext(
                max_length=len(prompt) + new_tokens,
                tokens=TokenBuffer(np.array(prompt, np.int64)),
                sampling_params=SamplingParams(
                    temperature=0, max_new_tokens=new_tokens, ignore_eos=True
                ),
            )
            for prompt in prompts
        ]
        with GenerateIterator.from_contexts(self._model.pipeline, contexts) as batch:
            for step in batch:
                steps.ended([len(tokens) for tokens in step.values()])
        return steps.timed()


def options(job: Job) -> dict[str, object]:
    """What `AutoModel` is given beside the target's folder."""
    return {
        "devices": job.devices,
        "max_batch_size": job.rows,
        "max_length": job.max_length,
        "max_batch_input_tokens": job.rows * job.context,
        "quantization_encoding": "bfloat16",
        "draft_model_path": job.draft_folder,
        "draft_quantization_encoding": "bfloat16",
        "speculative_method": job.method,
        "num_speculative_tokens": job.draft_tokens,
        "synthetic_acceptance_rate": mean_of_runs(job.acceptance, job.draft_tokens),
        "enable_overlap_scheduler": True,
        # MAX's architecture for DFlash says that it cannot be captured.
        "device_graph_capture": job.method == "eagle",
    }
