"""The unified graph: DeepSeek-V3 target, acceptance and MTP draft in one execution."""

from __future__ import annotations

from max.graph import Graph
from max.nn import Module

from unispec.pipelines.drafts.mtp.draft import DraftOfStep, MtpDraft
from unispec.pipelines.drafts.options import acceptance_rule
from unispec.pipelines.speculative.sequential import sequential_step
from unispec.pipelines.speculative.step import StepInputs, StepOutputs, StepSignature
from unispec.pipelines.targets.deepseek.inputs import DEEPSEEK_ORDER, distributed_types
from unispec.pipelines.targets.deepseek.stack import DeepseekV3, TargetOfStep
from unispec.sampling.late_masks import AfterMasks, late_mask_types, with_late_masks

from .config import UnifiedMTPDeepseekV3Config

__all__ = ["UnifiedMTPDeepseekV3", "build_graph"]


class UnifiedMTPDeepseekV3(Module):
    """Target and draft; their weights load under `target.` and `draft.`.

    Args:
        config: the target's stack and how it drafts.
    """

    def __init__(self, config: UnifiedMTPDeepseekV3Config) -> None:
        super().__init__()
        self.target = DeepseekV3(config.target)
        self.draft = MtpDraft(
            config.target,
            embed_tokens=self.target.embed_tokens,
            lm_head=self.target.lm_head,
        )
        self.rule = acceptance_rule(config.speculative_config)
        self.late_masks = config.late_masks

    def __call__(self, step: StepInputs) -> StepOutputs:
        """Builds one step: merge, verify, accept, shift, propose."""
        target, draft = TargetOfStep(self.target, step), DraftOfStep(self.draft, step)
        rule = AfterMasks(self.rule, step.more) if self.late_masks else self.rule
        return sequential_step(target, draft, rule, step)


def build_graph(config: UnifiedMTPDeepseekV3Config, module: UnifiedMTPDeepseekV3) -> Graph:
    """Builds the graph of one step; nothing is compiled.

    Args:
        config: the configuration that the module was made from.
        module: target and draft.
    """
    speculative = config.speculative_config
    order: tuple[str, ...] = DEEPSEEK_ORDER
    more = distributed_types(config.devices, config.target.ep)
    if config.late_masks:
        order = with_late_masks(order)
        more |= late_mask_types(config.devices[0], config.target.vocab_size)
    inputs = StepSignature(
        device=config.devices[0],
        vocab_size=config.target.vocab_size,
        kv_params=config.get_kv_params(),
        sampled_drafts=speculative.draft_proposal == "sampled",
        thinking_phase=speculative.use_relaxed_acceptance_for_thinking,
        order=order,
        more=more,
    )
    with Graph("unified_mtp_deepseekV3", input_types=inputs.types()) as graph:
        graph.output(*module(inputs.take(graph.inputs)).values())
    return graph
