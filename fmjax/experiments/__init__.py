"""Experiments: sweeps, trials, statistics, evidence."""
