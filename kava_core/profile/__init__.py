"""``kava profile``: what a spec's models and aligners do to a few examples, before any training."""
