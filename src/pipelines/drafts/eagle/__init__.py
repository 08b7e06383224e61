"""The EAGLE draft for Llama targets."""
