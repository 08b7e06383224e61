"""The Llama 3 decoder stack, as a target and as the layers of an EAGLE draft."""
