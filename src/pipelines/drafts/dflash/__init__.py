"""The DFlash draft: one block of tokens in one pass over the target's features."""
