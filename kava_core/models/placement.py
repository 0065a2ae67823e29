"""Place a teacher's weights: on the student's device, divided among all processes, or on another device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kava_core.config import Part
from kava_core.errors import SpecError
from kava_core.kv.capture.capture import Capture
from kava_core.models.fsdp import decoder_layers, is_sharded
from kava_core.processes import processes_met
from kava_core.protocols.axes import Cache

REPLICATED, SHARDED = "replicated", "sharded"


class CaptureElsewhere(Capture):
    """A capture of a model on a device of its own, whose cache comes to the student's.

    Args:
        home: the student's device.
        each: as for ``Capture``; gets its layer on ``home``.
        Everything else as for ``Capture``.
    """

    def __init__(
        self,
        *args: Any,
        home: torch.device,
        each: Callable[[int, Cache], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.home = home
        self._each_here = each
        super().__init__(*args, **kwargs, each=None if each is None else self._bring)

    def _bring(self, index: int, cache: Cache) -> None:
        assert self._each_here is not None
        self._each_here(index, cache.map(self._home))

    def take(self) -> Cache:
        """Return the captured parts, as ``Capture.take`` does, moved to ``home``."""
        return super().take().map(self._home)

    def _home(self, x: Tensor, _: Part) -> Tensor:
        return x.to(self.home)


def place_model(
    model: nn.Module, make: partial[Any], placement: str, device: torch.device, *, who: str
) -> partial[Any]:
    """Bring a frozen model to where its spec places it.

    Args:
        model: a causal language model, run whole or by its ``base_model`` alone.
        make: makes a capture of it.
        placement: ``replicated``, ``sharded`` or a device, as in ``TeacherSpec.placement``.
        device: that of the batches and of the student.
        who: named in errors.

    Returns:
        What makes a capture from now on. Captures made before may no longer be used.

    Raises:
        SpecError: there is no such device, or the model cannot be divided.
    """
    if placement == SHARDED and processes_met() > 1:
        shard_model(model, device, who=who)
    elif placement in (REPLICATED, SHARDED):
        model.to(device)
    else:
        return _place_elsewhere(model, make, _own_device(placement, who), device)
    return make


def shard_model(model: Any, device: torch.device, *, who: str) -> None:
    """Divide a frozen causal language model among all processes, in place.

    Its layers are gathered one by one when they run. All processes must run it the same number of times.
    """
    base = model.base_model
    if is_sharded(base):
        return
    if any(type(p) is not nn.Parameter or not p.is_floating_point() for p in model.parameters()):
        raise SpecError(f"{who}: placement: quantised weights cannot be sharded; place it replicated")
    mesh = init_device_mesh(device.type, (processes_met(),))
    inside = {id(p) for p in base.parameters()}
    heads = [child for child in model.children() if child is not base]
    for head in heads:
        head.to(device)
        if not any(id(p) in inside for p in head.parameters()):
            fully_shard(head, mesh=mesh, reshard_after_forward=True)
    for module in (*decoder_layers(base), base):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _own_device(placement: str, who: str) -> torch.device:
    device = torch.device(placement)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise SpecError(f"{who}: placement: {placement}: there are {count} CUDA devices here")
    return device


def _place_elsewhere(
    model: nn.Module, make: partial[Any], device: torch.device, home: torch.device
) -> partial[Any]:
    model.to(device)
    if device == home or make.func is CaptureElsewhere:
        return make
    model.base_model.register_forward_pre_hook(partial(_send_inputs, device), with_kwargs=True)
    return partial(CaptureElsewhere, *make.args, **make.keywords, home=home)


def _send_inputs(device: torch.device, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return send_to_device(args, device), send_to_device(kwargs, device)


def check_even_evaluation(distiller: Any, evaluator: Any, count: int) -> None:
    """Check that all processes validate the same number of batches, if a teacher is divided.

    A process that runs a divided teacher waits for all others to run it as well.

    Args:
        distiller: has the teachers.
        evaluator: has the validation examples and the batch size.
        count: number of processes.

    Raises:
        SpecError: the processes would run a divided teacher different numbers of times.
    """
    examples, batch = len(evaluator.examples), evaluator.spec.batch_size
    batches = {ceil(len(range(first, examples, count)) / batch) for first in range(count)}
    divided = [t.name for t in distiller.teachers if is_sharded(t.model.base_model)]
    if divided and len(batches) > 1:
        raise SpecError(
            f"teacher {divided[0]!r}: placement: sharded: {examples} validation examples in batches of "
            f"{batch} are not as many batches in each of {count} processes; "
            f"set evaluate.examples to a multiple of {count}"
        )
