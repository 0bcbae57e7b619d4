"""Hostile bytes for every parser: the targets, a mutator that knows JSON, and two ways to run them."""
