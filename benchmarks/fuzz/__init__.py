"""Fuzzing: what is tried, by seed, and what must hold. `python -m benchmarks.fuzz` runs it at length."""
