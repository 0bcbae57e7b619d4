"""Runs that are killed, starved and cut off, at every operation that reaches the disk."""
