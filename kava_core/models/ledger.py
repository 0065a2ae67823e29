"""Count what a run's training costs while it happens: tokens, operations, time, memory.

Evaluation, pretraining and calibration are not counted. Padding is computed, so operations count it; tokens
do not. Counts go on after a resume.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kava_core.errors import CheckpointError
from kava_core.kv.capture.attention_layers import without_adapters

STUDENT = "student"
HEAD = "head"


@dataclass
class ModelCounts:
    """What one model, or its language-model head, has read."""

    positions: float = 0.0
    """Forward passes times positions, padding included; a backward pass counts as the passes it costs."""
    pairs: float = 0.0
    """The same, times the positions that attention looked back on or up to."""
    passes: int = 0
    """Forward passes."""


class Ledger:
    """Counts of one process; ``counting`` switches it on around a training pass.

    Args:
        backward: forward passes that a pass of the student with gradient is worth.
    """

    def __init__(self, backward: int) -> None:
        self.backward = float(backward)
        self.passes = 0
        """Forward passes of training, all batches of a step counted."""
        self.on = False
        self.before = 0
        """Peak memory of the processes that went before this one."""
        self.read: dict[str, ModelCounts] = {}
        self.tokens: dict[str, Tensor | int] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is done inside, which is the pass over one training batch."""
        try:
            with self.noting():
                yield
        finally:
            self.passes += 1

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Count what is done inside for a training batch, but not as its pass."""
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def add(self, name: str, rows: int, queries: int, keys: int, times: float = 1.0) -> None:
        """Count a forward pass.

        Args:
            name: of the model, or of its head.
            rows: texts that are read.
            queries: positions of each text that are computed.
            keys: positions that each of them may attend to.
            times: forward passes that this one is worth.
        """
        if self.on:
            counts = self.read.setdefault(name, ModelCounts())
            counts.passes += 1
            counts.positions += rows * queries * times
            counts.pairs += rows * queries * keys * times

    def add_text(self, name: str, mask: Tensor, times: float = 1.0, *, head: bool = False) -> None:
        """Count a pass over a whole padded batch.

        Args:
            name: of the model.
            mask: real positions, ``batch time``.
            times: forward passes that this one is worth.
            head: whether the language-model head read all positions.
        """
        rows, time = mask.shape
        self.add(name, rows, time, time, times)
        if head:
            self.add(f"{name} {HEAD}", rows, time, 1, times)

    def add_tokens(self, name: str, mask: Tensor) -> None:
        """Count real tokens; they are summed on their device, so that nothing waits for it."""
        if self.on:
            self.tokens[name] = self.tokens.get(name, 0) + mask.detach().sum()

    def watch(self, student: nn.Module, decoder: nn.Module) -> None:
        """Count a student that is read in pieces (latent tokens) at every call of its decoder and head."""
        decoder.register_forward_pre_hook(self._decoder_called, with_kwargs=True)
        without_adapters(student).get_output_embeddings().register_forward_pre_hook(self._head_called)

    def _times(self) -> float:
        return self.backward if torch.is_grad_enabled() else 1.0

    def _decoder_called(self, _: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        candidates = (*args, given.get("inputs_embeds"), given.get("input_ids"))
        text = next(candidate for candidate in candidates if candidate is not None)
        mask = given.get("attention_mask")
        rows, queries = text.shape[:2]
        self.add(STUDENT, rows, queries, queries if mask is None else mask.shape[-1], self._times())

    def _head_called(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.add(f"{STUDENT} {HEAD}", args[0].shape[0], args[0].shape[1], 1, self._times())

    def save(self, file: Path) -> None:
        """Write all counts to a JSON file."""
        tokens = {name: int(count) for name, count in self.tokens.items()}
        read = {name: asdict(counts) for name, counts in self.read.items()}
        record = {"passes": self.passes, "read": read, "tokens": tokens, "memory": self.peak()}
        file.write_text(json.dumps(record), encoding="utf-8")

    def load(self, file: Path) -> None:
        """Read the counts that ``save`` wrote, and go on from them.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            self.passes, self.before = saved["passes"], saved["memory"]
            self.tokens = dict(saved["tokens"])
            self.read = {name: ModelCounts(**counts) for name, counts in saved["read"].items()}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{file}: unreadable: {error}") from error

    def peak(self) -> int:
        """Return the peak memory of the run in bytes, over all processes that continued it."""
        return max(self.before, peak_memory())

    def state(self) -> dict[str, Any]:
        """Return all counts by name, to be added up over processes."""
        state: dict[str, Any] = {}
        for name, counts in self.read.items():
            for field, value in asdict(counts).items():
                state[f"{field} {name}"] = value
        for name, count in self.tokens.items():
            state[f"tokens {name}"] = int(count)
        return state


def peak_memory() -> int:
    """Return the peak memory since ``reset_peak_memory`` in bytes: of all GPUs, or of this process.

    The process's own memory counts only if there is no GPU.
    """
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Forget the peak of what this process did before (a pretraining, another run)."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # Linux: sets the high-water mark back to what is held now
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
