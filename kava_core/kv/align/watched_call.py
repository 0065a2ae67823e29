"""Call a component in debug mode, and see what its results do not show.

That is: an input changed in place, a result that another call does not give again, and a result without the
gradient that its input asks for.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kava_core import shapecheck
from kava_core.errors import PluginError

TOLERANCE = 1e-4
"""Largest difference of two calls, relative to the largest value, that the order of a GPU's sums may make."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor inside tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    else:
        for inner in values_inside(value).values():
            yield from tensors_in(inner)


def values_inside(value: Any) -> Mapping[Any, Any]:
    """Return what a mapping, sequence or dataclass holds, by key, index or field; nothing of other values."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def call_component(component: Any, *arguments: Any, method: str = "__call__") -> Any:
    """Return what a component returns; in debug mode watch it.

    Args:
        component: a module, or a component at one layer.
        arguments: what it is given.
        method: what is called.

    Raises:
        PluginError: in debug mode, if it changed an input, or gives something else when it is called again.
    """
    if not shapecheck.active():
        return getattr(component, method)(*arguments)
    random_state = _random_state(arguments)
    with unchanged_inputs(arguments):
        returned = getattr(component, method)(*arguments)
    _require_repeatable(component, method, arguments, returned, random_state)
    return returned


@contextmanager
def unchanged_inputs(arguments: Sequence[Any]) -> Iterator[None]:
    """Refuse, in debug mode, what changes its inputs in place inside.

    Raises:
        PluginError: a tensor in ``arguments`` holds other numbers than before.
    """
    tensors = [x for x in tensors_in(arguments) if not x.is_meta] if shapecheck.active() else []
    copies = [x.detach().clone() for x in tensors]
    yield
    for x, copied in zip(tensors, copies, strict=True):
        if not _same_numbers(x.detach(), copied):
            raise PluginError(
                f"changed its input in place (a tensor of shape {list(x.shape)}), must work on a copy of it"
            )


def require_attached(returned: Tensor, given: Tensor) -> None:
    """Refuse, in debug mode, a result that stops the gradient of what was given.

    Raises:
        PluginError: the input needs a gradient and the result has none.
    """
    if shapecheck.active() and torch.is_grad_enabled() and given.requires_grad and not returned.requires_grad:
        raise PluginError("returned a detached tensor, must be attached to its input, which needs a gradient")


def require_loss_attached(loss: Tensor, student: Any) -> None:
    """Refuse, in debug mode, a loss by which the student would not learn.

    Args:
        loss: what the component returned.
        student: the student's cache, as the component got it.

    Raises:
        PluginError: the student's cache needs a gradient and gets none from the loss.
    """
    if not (shapecheck.active() and torch.is_grad_enabled()):
        return
    wanted = [x for x in tensors_in(student) if x.requires_grad]
    if not wanted:
        return
    reached: Sequence[Tensor | None] = [None] * len(wanted)
    if loss.requires_grad:
        reached = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    if all(gradient is None for gradient in reached):
        raise PluginError("returned a loss detached from the student, which needs a gradient")


def _require_repeatable(
    component: Any, method: str, arguments: Sequence[Any], returned: Any, random_state: _RandomState
) -> None:
    """Call once more, with the same random numbers, and compare."""
    again = _call_copy(component, method, arguments, random_state)
    for first, second in zip(tensors_in(returned), tensors_in(again), strict=False):
        if first.shape != second.shape or first.dtype != second.dtype or not _nearly_same(first, second):
            raise PluginError(
                "returned something else when it was called again with the same input; random numbers must "
                "come from torch's own generator"
            )


_RandomState = tuple[list[torch.device], list[Tensor]]
"""Devices other than the CPU, and the states of the generators of the CPU and of these."""


def _random_state(arguments: Sequence[Any]) -> _RandomState:
    devices = sorted({x.device for x in tensors_in(arguments) if x.device.type == "cuda"}, key=str)
    return devices, [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _call_copy(component: Any, method: str, arguments: Sequence[Any], random_state: _RandomState) -> Any:
    """Call a shallow copy, so that what it counts or remembers counts once."""
    devices, (of_cpu, *of_devices) = random_state
    with torch.random.fork_rng(devices=devices), torch.no_grad(), _buffers_restored(component):
        torch.set_rng_state(of_cpu)
        for device, state in zip(devices, of_devices, strict=True):
            torch.cuda.set_rng_state(state, device)
        return getattr(_shallow_copy(component), method)(*arguments)


def _shallow_copy(component: Any) -> Any:
    """Return a module that shares its tensors with a component, and not what its attributes are set to."""
    if not isinstance(component, nn.Module):
        return component
    copied = copy.copy(component)
    copied.__dict__["_buffers"] = dict(component._buffers)
    return copied


@contextmanager
def _buffers_restored(component: Any) -> Iterator[None]:
    buffers = list(component.buffers()) if isinstance(component, nn.Module) else []
    copies = [buffer.clone() for buffer in buffers]
    yield
    for buffer, copied in zip(buffers, copies, strict=True):
        if not buffer.is_meta and not _same_numbers(buffer, copied):
            # By ``data``, because autograd must not hear of a change that is undone.
            buffer.data.copy_(copied)


def _same_numbers(x: Tensor, y: Tensor) -> bool:
    """Return whether both hold the same numbers; NaN is the same as NaN."""
    if x.is_floating_point():
        return torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
    return torch.equal(x, y)


def _nearly_same(x: Tensor, y: Tensor) -> bool:
    if x.is_meta or y.is_meta or not x.numel():
        return x.is_meta == y.is_meta
    if not x.is_floating_point():
        return torch.equal(x, y)
    scale = float(x.detach().nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(x.detach(), y.detach(), rtol=0, atol=TOLERANCE * scale, equal_nan=True)
