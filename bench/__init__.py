"""Benchmarks of the ops against what a user would write without them: `pytest bench -m kernels`."""
