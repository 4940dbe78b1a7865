"""Whole jobs, callable from Python: train, load, sample, evaluate."""
