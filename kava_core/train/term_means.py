"""Average the loss terms over the steps between two log lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kava_core.errors import CheckpointError


class TermMeans:
    """Means of the loss terms since the last log line; saved with every checkpoint, so no step is lost."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add_terms(self, terms: Mapping[str, Tensor]) -> None:
        """Add the terms of a forward pass; they add up over the passes of a step."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()

    def take_means(self) -> dict[str, Tensor]:
        """Return the means, by name, and begin anew."""
        means = {name: value / self.steps for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means

    def save(self, file: Path) -> None:
        """Write the sums as JSON, in which float32 survives exactly."""
        sums = {name: value.item() for name, value in self.sums.items()}
        file.write_text(json.dumps({"steps": self.steps, "sums": sums}), encoding="utf-8")

    def load(self, file: Path, device: torch.device) -> None:
        """Go on from what ``save`` wrote.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: unreadable: {error}") from error
        self.sums = {name: torch.tensor(value, device=device) for name, value in saved["sums"].items()}
        self.steps = saved["steps"]
