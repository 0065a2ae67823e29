"""Show what the latent tokens of a finished run became: ``kava latents``."""
