"""Process: holds every answer against the target's own logits, token by token.

If each token of an answer is the target's most likely one after the tokens before it, the
answer is what the target alone writes. Logits depend in their last bits on how many
tokens are computed at once, so a token whose logit is within `TIE` of the largest
counts as right as well; such an answer is called tied, not exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .subprocesses import Json, serve

TIE: Final = 1e-3


def judge(
    model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int], max_new_tokens: int
) -> Json:
    """Judges one answer.

    Returns:
        `verdict` (`"exact"`, `"tied"` or `"wrong"`), and if it is not exact the position `at`
        of the answer's first token that is not the most likely one, None if it only ended at
        the wrong place, and `behind`, how far that token's logit is from the largest.
    """
    eos = model.config.eos_token_id
    ended_early = len(answer) < max_new_tokens and answer[-1] != eos
    if ended_early or eos in answer[:-1]:
        return {"verdict": "wrong", "at": None, "behind": None}
    tokens = torch.tensor([[*prompt, *answer]])  # [1, P + N]
    with torch.inference_mode():
        logits = model(tokens, logits_to_keep=len(answer) + 1).logits[0, :-1]  # [N, V]
    chosen = logits.gather(1, tokens[0, len(prompt) :, None])[:, 0]  # [N]
    behind = logits.amax(1) - chosen  # [N]
    if not behind.any():
        return {"verdict": "exact"}
    first = int(behind.nonzero()[0])
    verdict = "tied" if bool((behind < TIE).all()) else "wrong"
    return {"verdict": verdict, "at": first, "behind": float(behind[first])}


def _work(job: Json) -> Json:
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return {
        "judgements": [
            judge(model, item["prompt"], item["answer"], job["max_new_tokens"])
            for item in job["answers"]
        ]
    }


if __name__ == "__main__":
    serve(lambda job: (_work(job), None))
