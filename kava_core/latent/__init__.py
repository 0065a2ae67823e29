"""Train and run students that reason in continuous latent tokens instead of written steps."""
