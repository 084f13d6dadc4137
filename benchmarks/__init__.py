"""Benchmarks: what a message costs on this machine, beside a plain Python loop that does the same (``python -m benchmarks``)."""
