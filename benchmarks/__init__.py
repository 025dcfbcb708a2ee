"""Benchmarks: what is fast, measured beside a baseline in the same run; see README.md."""
