"""Reasoning in continuous latent tokens instead of written steps."""
