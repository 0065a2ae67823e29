"""Compute the sections of a report, one file each."""
