"""What each contender loads for one model in one number format."""

from __future__ import annotations

from collections.abc import Sequence

from generation.subprocesses import Json

from .contenders import Contender
from .dflash_gguf import dflash_gguf
from .models import Model

__all__ = ["jobs"]


def jobs(
    contenders: Sequence[Contender],
    model: Model,
    rows: int,
    max_length: int,
    llama_server: str | None,
) -> dict[str, Json]:
    """By contender what its process is told.

    Args:
        rows: most prompts at a time.
        max_length: longest sequence, in tokens.
        llama_server: the program to run instead of xllamacpp.
    """
    return {
        contender.name: _job(contender, model, rows, max_length, llama_server)
        for contender in contenders
    }


def _job(
    contender: Contender, model: Model, rows: int, max_length: int, llama_server: str | None
) -> Json:
    job: Json = {"file": str(model.file)}
    if contender.system == "openvino":
        return job
    job |= {"rows": rows, "max_length": max_length}
    speculation = {"method": contender.method, "draft_tokens": contender.draft_tokens}
    if contender.system == "llama.cpp":
        draft = str(dflash_gguf(model.form)) if contender.method == "dflash" else None
        return {**job, **speculation, "draft_file": draft, "binary": llama_server}
    job |= {"system": contender.system, "encoding": model.form.encoding}
    return {**job, "file": str(model.folder)} if contender.needs_folder else {**job, **speculation}
