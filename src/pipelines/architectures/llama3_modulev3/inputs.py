"""Inputs of the Llama 3 graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from max import tree
from max.driver import Buffer
from max.pipelines.lib import ModelInputs

from unispec.pipelines.runtime.inputs import needed_input, refuse_inputs

__all__ = ["Llama3Inputs"]


@dataclass
class Llama3Inputs(ModelInputs):
    """One step's inputs. B rows, T new tokens in all. `kv_cache_inputs` must be set too."""

    NOT_TAKEN: ClassVar[tuple[str, ...]] = (
        "lora_ids",
        "lora_ranks",
        "lora_buffers",
        "hidden_states",
    )
    """Fields that must stay unset: the graph has no such input."""

    tokens: Buffer
    """int64 `[T]`: the new tokens of each row, ragged."""
    input_row_offsets: Buffer
    """uint32 `[B + 1]`: where each row starts in `tokens`."""
    return_n_logits: Buffer
    """int64 `[1]` on the host: logit rows per row, with `ReturnLogits.VARIABLE`."""
    lora_ids: Buffer | None = field(default=None, kw_only=True)
    """Not taken."""
    lora_ranks: Buffer | None = field(default=None, kw_only=True)
    """Not taken."""

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The inputs in the graph's order, the cache's last.

        Raises:
            InputError: an input is set that the graph does not take, or the cache is not set.
        """
        refuse_inputs(self, self.NOT_TAKEN)
        cache = tree.leaves(needed_input(self, "kv_cache_inputs"))
        return (self.tokens, self.input_row_offsets, self.return_n_logits, *cache)
