"""The proof on a GPU: `python -m benchmarks.gpu --out DIR`."""
