"""Benchmarks: two ways of doing the same, in the same process and run."""
