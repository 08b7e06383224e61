"""The parts of `benchmarks/cpu.py` and `benchmarks/perplexity.py`."""
