"""Comparison of runs: what they were given, what came of it, and what of the difference is more than chance."""
