"""What a server's options may ask of MAX and these pipelines cannot do."""

from __future__ import annotations

from max.pipelines.lib import PipelineConfig

from unispec.errors import InputError

__all__ = ["check_server"]

_ROLE = "prefill_and_decode"


def check_server(config: PipelineConfig) -> None:
    """Refuses options that would be ignored, or would end the first step.

    Raises:
        InputError: LoRA adapters, or a server that only prefills or only decodes.
    """
    if config.lora is not None and config.lora.enable_lora:
        raise InputError("LoRA adapters are not supported by unispec: leave out --enable-lora")
    role = config.runtime.pipeline_role
    if role != _ROLE:
        raise InputError(
            f"pipeline_role is {role!r}, but a step of unispec prefills and decodes: use {_ROLE!r}"
        )
    if not config.runtime.enable_chunked_prefill:
        raise InputError(
            "prompts are read in chunks, for which a step has room: leave out"
            " --no-enable-chunked-prefill"
        )
