"""Pipelines: architectures, speculative steps and the runtime that drives them."""
