"""Weights in and out: files of other codes, read by name into diffjax's networks."""
