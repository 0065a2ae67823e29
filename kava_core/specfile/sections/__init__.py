"""Describe every block of a spec: one file a block; field docstrings are the spec reference."""
