"""Experiments that can be believed: what a difference between two variants is worth."""
