"""Measurements: the programs that make them, and what they gave as one small JSON each."""
