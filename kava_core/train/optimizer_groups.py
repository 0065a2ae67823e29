"""Give what aligns and routes parameter groups of its own in the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def parameter_learning_rates(beside_student: nn.Module, common: float) -> dict[Tensor, float]:
    """Return every parameter with the ``learning_rate`` its module names, or the common one."""
    rates: dict[Tensor, float] = dict.fromkeys(beside_student.parameters(), common)
    for module in beside_student.modules():
        rate = getattr(module, "learning_rate", None)
        if isinstance(rate, int | float):
            rates |= dict.fromkeys(module.parameters(), float(rate))
    return rates


def split_parameter_group(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], rates: Mapping[Tensor, float]
) -> None:
    """Move a group's parameters that are in ``rates`` to a new group for each rate, without weight decay."""
    staying: list[Tensor] = []
    moved: dict[float, list[Tensor]] = {}
    for parameter in group["params"]:
        if parameter in rates:
            moved.setdefault(rates[parameter], []).append(parameter)
        else:
            staying.append(parameter)
    group["params"] = staying
    for rate, parameters in sorted(moved.items()):
        optimizer.add_param_group({**group, "params": parameters, "lr": rate, "weight_decay": 0.0})
