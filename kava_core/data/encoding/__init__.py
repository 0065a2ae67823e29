"""Encode texts, and look at what a tokenizer makes of the data."""
