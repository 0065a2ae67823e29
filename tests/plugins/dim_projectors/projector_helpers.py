"""Small projectors and tensors for their tests."""

from __future__ import annotations

import torch

from kava_core.protocols.axes import Geometry
from kava_plugins.dim_projectors import kava_dim_projectors

BATCH, LAYER, HEAD, QHEAD, TIME, T_DIM = 3, 2, 2, 4, 7, 5


def declare(name, **fields):
    """A declaration by its registered name."""
    [declaration] = [one for one in kava_dim_projectors() if one.component_name() == name]
    return declaration(**fields)


def build(name, dim, *, layer=LAYER, head=HEAD, qhead=QHEAD, t_dim=T_DIM, hidden=8, t_hidden=8, **fields):
    """A projector from ``t_dim`` to ``dim``."""
    student = Geometry(layer=layer, head=head, dim=dim, qhead=qhead, hidden=hidden)
    teacher = student.with_(dim=t_dim, hidden=t_hidden)
    return declare(name, **fields).build(teacher=teacher, student=student)


def draw(head=HEAD, seed=0, *, batch=BATCH, layer=LAYER, time=TIME, dim=T_DIM):
    """Normal float64 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, layer, head, time, dim, dtype=torch.float64, generator=generator)


def heads_of(part):
    """The head count of ``build``'s default geometry."""
    return QHEAD if part == "queries" else HEAD
