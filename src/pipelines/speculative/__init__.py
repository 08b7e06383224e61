"""The phases of a step, and the ways to string them together."""
