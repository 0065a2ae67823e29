"""Teachers on a GPU of their own run while the student does: their work waits on a CUDA stream beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStream:
    """A stream of the student's device, on which targets arrive; off CUDA it does nothing.

    Without it the copy of a teacher's cache from another GPU makes the student's forward pass wait. With
    every model on one device it would gain little and keep more memory alive, so it is not used there.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, work is queued on the stream, after what was queued before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self, *made: Tensor) -> None:
        """What is queued from now on waits for the stream; ``made`` there, these tensors are used here."""
        if self._stream is None:
            return
        here = torch.cuda.current_stream(self._stream.device)
        here.wait_stream(self._stream)
        for tensor in made:
            tensor.record_stream(here)


def on_other_gpu(placement: str, device: torch.device) -> bool:
    """Whether a teacher's placement is a GPU other than the student's."""
    return placement.startswith("cuda") and torch.device(placement) not in (device, torch.device("cuda"))
