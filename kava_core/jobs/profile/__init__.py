"""Measure an alignment on one or two batches, before a long run: ``kava profile``."""
