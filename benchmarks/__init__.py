"""Benchmarks against torch.amp, side by side in one process: ``python -m benchmarks``."""
