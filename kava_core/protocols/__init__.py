"""Define the six kinds of component: one axis each, and the contract of that axis. A plugin may import these.

Every component is a ``torch.nn.Module``: its parameters and buffers move, train and are saved with the
student. One with an attribute ``learning_rate`` (float or None) has its parameters trained at that peak
rate instead of ``train.learning_rate``. A head adapter, projector or loss with numbers of its own for every
student layer names these parameters and buffers, whose first axis is the layer, in an attribute ``layered``:
with ``train.stream`` it is called with one layer at a time (or a method ``at_layer(row)`` returns what is
called). Components take and return whole tensors, not lists, so that every element is shape-checked. The
functions in ``kava_core.kv.align.boundaries`` check what third-party components return.

There is one file for each kind: ``layer_mapper``, ``head_adapter``, ``time_warper``, ``dim_projector``,
``fuser``, ``kv_loss``. The values that components exchange are in ``axes`` (Geometry, Cache), ``timeline``,
``time_map`` and ``weighted_rows``.
"""

from __future__ import annotations

from typing import Any

from kava_core.moved import moved_name


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
