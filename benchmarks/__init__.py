"""Benchmarks: `python -m benchmarks.speed` (peers side by side) and `python -m benchmarks.full` (published numbers)."""
