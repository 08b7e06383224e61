"""Process: OpenVINO GenAI, in an interpreter that need not have unispec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import openvino  # type: ignore[import-not-found, unused-ignore]
import openvino_genai  # type: ignore[import-not-found, unused-ignore]
from generation.subprocesses import Json, serve

from .answer import Answer


def _serve(job: Json) -> tuple[Json, Callable[[Json], Json]]:
    pipeline = openvino_genai.LLMPipeline(
        job["file"],
        "CPU",
        INFERENCE_NUM_THREADS=job["threads"],
        # As the others. Its own choice, bfloat16 where the processor has it, is as fast here.
        INFERENCE_PRECISION_HINT="f32",
    )
    config = openvino_genai.GenerationConfig()
    config.do_sample = False
    config.apply_chat_template = False

    def answer(request: Json) -> Json:
        prompts = request["prompts"]
        config.max_new_tokens = request["max_new_tokens"]
        width = max(map(len, prompts))
        # The shorter ones are padded on the left.
        padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        result = pipeline.generate(
            openvino_genai.TokenizedInputs(
                openvino.Tensor(np.array(padded, np.int64)),
                openvino.Tensor(np.array(mask, np.int64)),
            ),
            config,
        )
        metrics = result.perf_metrics
        first_ms, all_ms = metrics.get_ttft().mean, metrics.get_generate_duration().mean
        token_ids = [list(map(int, tokens)) for tokens in result.tokens]
        return asdict(
            Answer(
                token_ids=token_ids,
                first_token_s=first_ms / 1000,
                decode_s=(all_ms - first_ms) / 1000,
                decode_tokens=sum(map(len, token_ids)) - len(token_ids),
                acceptance_length=1.0,
            )
        )

    return {"about": f"openvino_genai {openvino_genai.__version__}"}, answer


if __name__ == "__main__":
    serve(_serve)
