"""The parts of `benchmarks/generate.py`, each contender in a process of its own."""
