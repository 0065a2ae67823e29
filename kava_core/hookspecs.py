"""Specify one hook for each kind of component. A plugin implements the hooks of its components' kinds.

Each hook returns declarations (``ComponentConfig`` subclasses); kava imports the implementation that a
declaration names only when a pipeline is built.
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from kava_core.config import ComponentConfig, KVLossConfig

hookspec = pluggy.HookspecMarker("kava")

KINDS: dict[str, str] = {
    "head_adapter": "kava_head_adapters",
    "time_warper": "kava_time_warpers",
    "layer_mapper": "kava_layer_mappers",
    "dim_projector": "kava_dim_projectors",
    "fuser": "kava_fusers",
    "kv_loss": "kava_kv_losses",
}
"""The hook that registers the components of a kind, by the kind's name in a spec."""


@hookspec
def kava_head_adapters() -> Sequence[type[ComponentConfig]]:
    """Register components that change the head axis: ``t_head → head``.

    A plugin that keeps the first heads::

        # pyproject.toml: [project.entry-points.kava] first_heads = "kava_first_heads"
        # kava_first_heads/__init__.py
        from typing import Literal
        from kava_core import hookimpl
        from kava_core.config import ComponentConfig

        class FirstHeadsConfig(ComponentConfig):
            '''Keep the first heads of the teacher.'''
            name: Literal["first_heads"] = "first_heads"
            component = "kava_first_heads.adapter:FirstHeadsAdapter"

        @hookimpl
        def kava_head_adapters():
            return [FirstHeadsConfig]

        # kava_first_heads/adapter.py
        from torch import nn

        class FirstHeadsAdapter(nn.Module):
            def __init__(self, config, *, teacher, student):
                super().__init__()
                self.heads = student.heads
                self.teacher_view = teacher.with_(head=student.head, qhead=student.qhead)
                self.student_view = student

            def forward(self, x, part):
                return x[:, :, : self.heads(part)]

            def fold(self, x):
                return x
    """


@hookspec
def kava_time_warpers() -> Sequence[type[ComponentConfig]]:
    """Register components that change the time axis: ``t_time → time``, plus which positions are valid.

    A plugin whose student position i reads teacher position i + 1::

        # kava_shift/__init__.py
        class ShiftConfig(ComponentConfig):
            '''Read the teacher one position ahead.'''
            name: Literal["shift"] = "shift"
            component = "kava_shift.warper:ShiftWarper"

        @hookimpl
        def kava_time_warpers():
            return [ShiftConfig]

        # kava_shift/warper.py
        import torch
        from torch import nn
        from kava_core.protocols.time_map import TimeMap

        class ShiftWarper(nn.Module):
            def __init__(self, config, *, teacher, student):
                super().__init__()

            def forward(self, teacher, student):
                time, t_time = student.mask.shape[1], teacher.mask.shape[1]
                position = (torch.arange(time, device=student.mask.device) + 1).clamp(max=t_time - 1)
                position = position.expand_as(student.mask)
                return TimeMap.gather(position, student.mask & teacher.mask.gather(1, position))
    """


@hookspec
def kava_layer_mappers() -> Sequence[type[ComponentConfig]]:
    """Register components that change the layer axis: ``t_layer → layer``, as a matrix of weights.

    A plugin that reads the teacher's first layers::

        # kava_first_layers/__init__.py
        class FirstLayersConfig(ComponentConfig):
            '''Student layer i reads teacher layer i.'''
            name: Literal["first_layers"] = "first_layers"
            component = "kava_first_layers.mapper:FirstLayersMapper"

        @hookimpl
        def kava_layer_mappers():
            return [FirstLayersConfig]

        # kava_first_layers/mapper.py
        import torch
        from torch import nn

        class FirstLayersMapper(nn.Module):
            def __init__(self, config, *, teacher, student):
                super().__init__()
                self.register_buffer("matrix", torch.eye(student.layer, teacher.layer), persistent=False)

            def forward(self):
                return self.matrix
    """


@hookspec
def kava_dim_projectors() -> Sequence[type[ComponentConfig]]:
    """Register components that change the width of a head: ``t_dim → dim``.

    A plugin that keeps the first channels::

        # kava_crop_width/__init__.py
        class CropWidthConfig(ComponentConfig):
            '''Keep the first channels of every head.'''
            name: Literal["crop_width"] = "crop_width"
            component = "kava_crop_width.projector:CropWidthProjector"

        @hookimpl
        def kava_dim_projectors():
            return [CropWidthConfig]

        # kava_crop_width/projector.py
        from torch import nn

        class CropWidthProjector(nn.Module):
            def __init__(self, config, *, teacher, student):
                super().__init__()
                self.dim = student.dim

            def forward(self, x, part):
                return x[..., : self.dim]
    """


@hookspec
def kava_fusers() -> Sequence[type[ComponentConfig]]:
    """Register components that weigh several teachers: ``teacher batch layer time``; kava applies weights.

    A plugin that believes only the first teacher::

        # kava_first_teacher/__init__.py
        class FirstTeacherConfig(ComponentConfig):
            '''All weight on the first teacher of the spec.'''
            name: Literal["first_teacher"] = "first_teacher"
            component = "kava_first_teacher.fuser:FirstTeacherFuser"

        @hookimpl
        def kava_fusers():
            return [FirstTeacherConfig]

        # kava_first_teacher/fuser.py
        import torch
        from torch import nn

        class FirstTeacherFuser(nn.Module):
            def __init__(self, config, *, teachers, student):
                super().__init__()

            def forward(self, context):
                weights = torch.zeros_like(context.valid, dtype=context.student.any.dtype)
                weights[0] = 1
                return weights[:, :, None].expand(-1, -1, context.student.any.shape[1], -1)
    """


@hookspec
def kava_kv_losses() -> Sequence[type[KVLossConfig]]:
    """Register losses between the student's cache and the aligned target.

    A plugin with the mean absolute difference::

        # kava_mae/__init__.py
        class MAEConfig(KVLossConfig):
            '''Mean absolute difference over heads and width.'''
            name: Literal["mae"] = "mae"
            component = "kava_mae.loss:MAELoss"

        @hookimpl
        def kava_kv_losses():
            return [MAEConfig]

        # kava_mae/loss.py
        import torch
        from torch import nn

        class MAELoss(nn.Module):
            def __init__(self, config, *, teacher, student):
                super().__init__()
                self.parts = config.parts

            def forward(self, student, target, weight):
                total = weight.new_zeros(())
                for part in self.parts:
                    difference = (getattr(student, part) - getattr(target, part)).abs().mean(dim=(2, 4))
                    total = total + torch.where(weight > 0, difference * weight, 0).sum()
                return total
    """
