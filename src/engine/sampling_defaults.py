"""A request's sampling parameters, of what a user asks and what the checkpoint states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from max.pipelines.context import SamplingParams, SamplingParamsInput
from max.pipelines.context.sampling_params import SamplingParamsGenerationConfigDefaults

from unispec.errors import InputError

__all__ = ["sampling_params"]

_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p")


def sampling_params(generation_config: Mapping[str, Any], **asked: Any) -> SamplingParams:
    """The parameters of one request; each call draws a seed unless one is given.

    A checkpoint that states greedy decoding (`do_sample: false`, temperature 0 or top-k 1) is
    greedy as long as the user asks for no sampling. Who asks for one of temperature, top-k,
    top-p and min-p gets exactly that: of these four, what such a checkpoint states is void.

    Args:
        generation_config: the checkpoint's generation_config.json.
        asked: fields of `SamplingParams`; None stands for the checkpoint's default, then MAX's.

    Raises:
        InputError: a value of the checkpoint is of the wrong type, or out of range.
    """
    explicit = SamplingParamsInput(**asked)
    names = SamplingParamsGenerationConfigDefaults.__dataclass_fields__
    defaults = {name: value for name, value in generation_config.items() if name in names}
    # MAX would make stop tokens of it, which `ignore_eos` does not ignore; the engine knows it.
    defaults.pop("eos_token_id", None)
    do_sample = defaults.pop("do_sample", None)
    if not isinstance(do_sample, bool | None):
        raise InputError(
            f"do_sample is {do_sample!r} in the model's generation_config.json; write true or false"
        )
    samples = any(asked.get(name) is not None for name in _SAMPLING)
    if do_sample is False or defaults.get("temperature") == 0 or defaults.get("top_k") == 1:
        for name in _SAMPLING:
            defaults.pop(name, None)
        if not samples:
            defaults["temperature"] = 0
    try:
        return SamplingParams.from_input_and_generation_config(
            explicit, SamplingParamsGenerationConfigDefaults(**defaults)
        )
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the model's generation_config.json cannot be used ({error}); correct the file or "
            "give the option"
        ) from error
