"""Runs of `vla train` beside each other: what they came to, how surely, and in what they differ."""
