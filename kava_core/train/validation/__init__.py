"""Measure a run while it trains: validation, answers, collapse, gradient shares, attention."""
