"""A draft's configuration in a process that has only just read it."""

from __future__ import annotations

from max.pipelines.lib import PipelineConfig

from unispec.checkpoints.draft_config import adopt, read_draft_config
from unispec.pipelines.unified.method import DraftMethod

__all__ = ["complete_draft"]


def complete_draft(pipeline_config: PipelineConfig, method: DraftMethod | None) -> None:
    """Brings the draft's Hugging Face config into the form that its method reads.

    MAX leaves such objects behind when it sends a configuration to a model worker, which reads
    them from the file again. Doing it twice changes nothing.

    Raises:
        InputError: a config.json that `read_draft_config` or the method refuses.
    """
    draft, speculative = pipeline_config.draft_model, pipeline_config.speculative
    if draft is None or method is None or speculative is None:
        return
    config = draft.huggingface_config
    # MAX has renamed it and looks it up by that name.
    names = config.architectures
    adopt(config, read_draft_config(draft.model_path, method.name))
    config.architectures = names
    method.prepare(config, speculative.num_speculative_tokens, source=draft.model_name)
