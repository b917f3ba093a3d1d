"""Algorithms as pure functions on tensors, one file each."""
