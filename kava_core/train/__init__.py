"""The engine: models, the composite module, the trainer, checkpoints, run directories."""
