"""Keep a run on disk: its folder, its numbers, its checkpoints, its state. No models here."""
