"""A draft's configuration in a process that has only just read it."""

from __future__ import annotations

from max.pipelines.lib import PipelineConfig

from unispec.checkpoints.draft_config import adopt, read_draft_config
from unispec.checkpoints.draft_kinds import method_of_draft, tensor_shapes
from unispec.checkpoints.model_config import read_config_object
from unispec.pipelines.unified.compose import compose
from unispec.pipelines.unified.model import UnifiedModel

__all__ = ["resolve_draft"]


def resolve_draft(pipeline_config: PipelineConfig, model: type[UnifiedModel]) -> type[UnifiedModel]:
    """Brings the draft's Hugging Face config into the form that its method reads.

    MAX leaves such objects behind when it sends a configuration to a model worker, which reads
    them from the file again. Doing it twice changes nothing.

    Args:
        model: the class of the pair, as MAX found it.

    Returns:
        The class of the pair, in the generation of the method that the draft is of.

    Raises:
        InputError: a config.json that `read_draft_config` or the method refuses.
    """
    draft, speculative, method = (
        pipeline_config.draft_model,
        pipeline_config.speculative,
        model.method,
    )
    if draft is None or method is None or speculative is None:
        return model
    shapes = tensor_shapes(draft.resolved_weight_paths())
    if method.later:
        found = method_of_draft(method.name, read_config_object(draft.model_path), shapes)
        method = next((later for later in method.later if later.name == found), method)
    config = draft.huggingface_config
    # MAX has renamed it and looks it up by that name.
    names = config.architectures
    adopt(config, read_draft_config(draft.model_path, method.name, shapes))
    config.architectures = names
    method.prepare(config, speculative.num_speculative_tokens, source=draft.model_name)
    return model if method is model.method else compose(model.family, method)
