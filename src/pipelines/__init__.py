"""Pipelines: architectures, speculative steps and the runtime that drives them.

What is the same in all packages:

- `hf` and `huggingface_config` are a model's Hugging Face config, `pipeline_config` and
  `model_config` are MAX's, of a pipeline and of one model in it; without a `model_config` the
  target's is read.
- `tensors` are a checkpoint's by name, with or without `model.` before it; `source` is the file or
  folder that errors name.
- `session` compiles and runs graphs; `graph` is that of one step, `weights` are all that it reads.
- `replica_batches` are the requests of each replica in row order, `num_drafts` the draft tokens
  that a step verifies in every row, `prev_model_inputs` the inputs of the step that produced the
  next tokens.

And in graphs:

- `x` is `[T, H]`, the hidden states of ragged rows, and so is what a layer returns; `row_offsets`,
  uint32 `[B + 1]`, says where each row starts; `tokens` are int64 `[T]`; the head reads `hidden`
  and the draft `features`.
- `cache` has the keys and values of one stack. Row b is written from `cache.cache_lengths[b]` on;
  `layer` is a layer's index in it, a uint32 scalar on the CPU.
- `freqs_cis` is the rotary table, `[positions, head_dim]`, or as wide as what is rotated.
- `config` is the stack's that a layer is part of; `device` and `devices` are where it runs.
"""

__all__ = []
