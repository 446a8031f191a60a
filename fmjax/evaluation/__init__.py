"""Evaluation: metrics over a split, log-likelihoods, benchmarks."""
