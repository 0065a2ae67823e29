"""Offer the command line: one verb, one thin function. Heavy imports are inside the functions."""
