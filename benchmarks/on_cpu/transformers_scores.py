"""Process: log probabilities that transformers gives to the tokens of a text, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generation.subprocesses import Json, serve
from transformers import AutoModelForCausalLM


def _serve(job: Json) -> tuple[Json, Callable[[Json], Json]]:
    torch.set_num_threads(job["threads"])
    file = Path(job["file"])
    # The weights of a GGUF file are dequantised.
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )

    def answer(request: Json) -> Json:
        tokens = torch.tensor(request["windows"])  # [W, T]
        scores = []
        with torch.inference_mode():
            for window in tokens:
                logprobs = model(window[None]).logits[0, :-1].log_softmax(-1)  # [T - 1, V]
                scores.append(logprobs.gather(1, window[1:, None])[:, 0].tolist())
        return {"logprobs": scores}

    return {"about": ""}, answer


if __name__ == "__main__":
    serve(_serve)
