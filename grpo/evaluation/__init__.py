"""Benchmarks, and comparing runs."""
