"""Train a student: runs, the trainer, checkpoints, what is measured meanwhile."""
