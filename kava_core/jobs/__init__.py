"""Do what needs models and is not training: one module a verb; only the command line imports them."""
