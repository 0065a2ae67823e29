"""Run teachers on a GPU of their own while the student runs, by queueing their work on a CUDA stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStream:
    """A CUDA stream of the student's device, on which targets arrive; it does nothing on other devices.

    Without it the copy of a teacher's cache from another GPU makes the student's forward pass wait. With
    every model on one device it would gain little and keep more memory alive, so it is not used there.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Queue the work done inside on the stream, after all that was queued before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self, *made: Tensor) -> None:
        """Let all work that is queued from now on wait for the stream.

        Args:
            made: tensors that were made on the stream and are used from now on.
        """
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for tensor in made:
            tensor.record_stream(current)


def on_other_gpu(placement: str, device: torch.device) -> bool:
    """Return whether a teacher's placement is a GPU other than the student's."""
    return placement.startswith("cuda") and torch.device(placement) not in (device, torch.device("cuda"))
