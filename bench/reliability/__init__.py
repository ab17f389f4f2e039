"""Proves that a run of the trainer survives what happens to long runs: `python -m bench.reliability`."""
