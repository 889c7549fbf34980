"""Benchmarks: `python -m bench.costs`, `bench.speed`, `bench.load`, `bench.gpu`."""
