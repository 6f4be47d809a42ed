"""Benchmarks: correctness first, then time and memory, every competitor in the same run."""
