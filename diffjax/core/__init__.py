"""The ground that every room stands on: trees, types, checks, numerics, randomness."""
