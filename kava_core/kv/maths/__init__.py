"""Compute with caches: masks, moments, resampling, CKA, rank and cosine. Plugins may import these."""
