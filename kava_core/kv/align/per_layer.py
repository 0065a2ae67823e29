"""Restrict a component to one student layer, for comparing layer by layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def component_at_layer(component: nn.Module, row: int | None) -> Any:
    """Return a component for tensors that hold only one student layer.

    Its parameters and buffers named in its attribute ``layered``, whose first axis is the student's layer,
    are cut to the one layer; gradients reach them. All others serve every layer. A component that treats
    layers otherwise has a method ``at_layer(row)`` that returns what is to be called.

    Args:
        component: a head adapter, dim projector or KV loss.
        row: the layer's index among the compared ones; None: all layers, the component as it is.
    """
    if row is not None and hasattr(component, "at_layer"):
        return component.at_layer(row)
    names = getattr(component, "layered", ())
    return component if row is None or not names else _ComponentAtLayer(component, names, row)


class _ComponentAtLayer:
    """Calls the component with a part of its tensors; everything else about it stays."""

    def __init__(self, component: nn.Module, names: tuple[str, ...], row: int) -> None:
        self._component = component
        tensors: dict[str, Tensor] = dict(component.named_parameters()) | dict(component.named_buffers())
        self._state = {}
        for name, tensor in tensors.items():
            if name in names:
                self._state[name] = tensor[row : row + 1]

    def __call__(self, *arguments: Any) -> Any:
        return functional_call(self._component, self._state, arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._component, name)
