"""The implementations. The first of each kind is sound; the others differ from it in one fault."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from kava_core.protocols.time_map import TimeMap


class Cropped(nn.Module):
    """The first channels, and zeros where the student is wider."""

    linear = shared_width = True

    def __init__(self, config, *, teacher, student):
        super().__init__()
        self.dim = student.dim

    def forward(self, x, part):
        x = x[..., : self.dim]
        return nn.functional.pad(x, (0, self.dim - x.shape[-1]))


class WrongAxis(Cropped):
    def forward(self, x, part):
        return super().forward(x, part).transpose(2, 3)


class UnnamedLayers(Cropped):
    def __init__(self, config, *, teacher, student):
        super().__init__(config, teacher=teacher, student=student)
        self.register_buffer("gain", torch.arange(1.0, 1 + student.layer)[:, None, None, None])

    def forward(self, x, part):
        return super().forward(x, part) * self.gain.to(x.dtype)


class WrongDtype(Cropped):
    def forward(self, x, part):
        return super().forward(x, part).float()


class InPlace(Cropped):
    def forward(self, x, part):
        with torch.no_grad():
            x.clamp_(-1, 1)
        return super().forward(x, part)


class BatchLeak(Cropped):
    def forward(self, x, part):
        return super().forward(x - x.mean(0), part)


class TimeLeak(Cropped):
    def forward(self, x, part):
        return super().forward(x - x.mean(3, keepdim=True), part)


class Detached(Cropped):
    def forward(self, x, part):
        return super().forward(x, part).detach()


class FalselyLinear(Cropped):
    def forward(self, x, part):
        return super().forward(x, part).tanh()


class FalselyShared(Cropped):
    def forward(self, x, part):
        return super().forward(x, part).cumsum(2)


class Noisy(Cropped):
    def forward(self, x, part):
        return super().forward(x, part) + 0.1 * torch.rand(())


class Forgetful(Cropped):
    def __init__(self, config, *, teacher, student):
        super().__init__(config, teacher=teacher, student=student)
        self.scale = torch.rand(()) + 0.5

    def forward(self, x, part):
        return super().forward(x, part) * self.scale.to(x.dtype)


class Homesick(Cropped):
    def forward(self, x, part):
        return torch.zeros(*x.shape[:-1], self.dim)


class PeeksAtPadding(Cropped):
    def __init__(self, config, *, teacher, student):
        super().__init__(config, teacher=teacher, student=student)
        self.register_buffer("scale", torch.ones(()))

    def observe(self, x, like, valid, part):
        self.scale = self.scale + x.mean()

    def finish(self):
        pass

    def forward(self, x, part):
        return super().forward(x, part) * self.scale.to(x.dtype)


class DividesByNothing(PeeksAtPadding):
    def observe(self, x, like, valid, part):
        pass

    def finish(self):
        self.scale = self.scale / torch.zeros(())


class Absolute(nn.Module):
    """Mean absolute difference."""

    def __init__(self, config, *, teacher, student):
        super().__init__()
        self.parts = config.parts

    def forward(self, student, target, weight):
        return torch.stack([self.part(x, getattr(target, part), weight) for part, x in student.items()]).sum()

    def part(self, x, target, weight):
        live = (weight != 0)[:, :, None, :, None]
        wide = torch.promote_types(x.dtype, torch.float32)
        difference = torch.where(live, x.to(wide) - target.to(wide), 0)
        return (difference.abs().mean((2, 4)) * weight).sum()


class MaskLeak(Absolute):
    def part(self, x, target, weight):
        wide = torch.promote_types(x.dtype, torch.float32)
        return ((x.to(wide) - target.to(wide)).abs().mean((2, 4)) * weight).sum()


class LayerLeak(Absolute):
    def part(self, x, target, weight):
        return super().part(x, target, weight) * weight.shape[1]


class DetachedWeight(Absolute):
    def forward(self, student, target, weight):
        return super().forward(student, target, weight.detach())


class DetachedLoss(Absolute):
    def part(self, x, target, weight):
        return super().part(x.detach(), target, weight)


class HalfSum(Absolute):
    def part(self, x, target, weight):
        live = (weight != 0)[:, :, None, :, None]
        return (torch.where(live, x - target, 0).abs().mean((2, 4)) * weight.to(x.dtype)).sum()


class FirstHeads(nn.Module):
    """The first heads, and zeros where the student has more."""

    linear = True

    def __init__(self, config, *, teacher, student):
        super().__init__()
        self.heads = student.heads
        self.teacher_view = teacher.with_(head=student.head, qhead=student.qhead)
        self.student_view = student

    def forward(self, x, part):
        x = x[:, :, : self.heads(part)]
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.heads(part) - x.shape[2]))

    def fold(self, x):
        return x


class WrongView(FirstHeads):
    def __init__(self, config, *, teacher, student):
        super().__init__(config, teacher=teacher, student=student)
        self.teacher_view = teacher


class DroppedFold(FirstHeads):
    def fold(self, x):
        return torch.cat([x[:, :, :1], torch.zeros_like(x[:, :, 1:])], 2)


class Shift(nn.Module):
    """The k-th token reads the teacher's k-th."""

    def __init__(self, config, *, teacher, student):
        super().__init__()

    def forward(self, teacher, student):
        last, first = self.last(teacher), self.first(teacher.mask)
        place = torch.arange(student.mask.shape[1]) - self.first(student.mask)
        valid = student.mask & (place <= last)
        return TimeMap.gather((place + first).clamp(0, max(teacher.mask.shape[1] - 1, 0)), valid)

    def last(self, teacher):
        return teacher.mask.sum(1, keepdim=True) - 1

    def first(self, mask):
        return (mask.cumsum(1) == 0).sum(1, keepdim=True)


class ReadsPadding(Shift):
    def first(self, mask):
        return torch.zeros(mask.shape[0], 1, dtype=torch.long)


class ReadsNeighbour(Shift):
    def forward(self, teacher, student):
        time_map = super().forward(teacher, student)
        return replace(time_map, index=time_map.index - 1)


class BatchLength(Shift):
    def last(self, teacher):
        return teacher.mask.sum(1, keepdim=True).amax(0, keepdim=True).expand(teacher.mask.shape[0], 1) // 2


class First(nn.Module):
    """All read the teacher's first layer."""

    def __init__(self, config, *, teacher, student):
        super().__init__()
        self.register_buffer("matrix", torch.eye(teacher.layer)[[0] * student.layer], persistent=False)

    def forward(self):
        return self.matrix


class SumsToTwo(First):
    def forward(self):
        return 2 * self.matrix


class Restless(First):
    calls = 0

    def forward(self):
        self.calls += 1
        return self.matrix.roll(self.calls, 1)


class Equal(nn.Module):
    """All teachers alike."""

    def __init__(self, config, *, teachers, student):
        super().__init__()

    def forward(self, context):
        layer = context.student.any.shape[1]
        return torch.ones_like(context.valid, dtype=torch.float32)[:, :, None].expand(-1, -1, layer, -1)


class Peeks(Equal):
    needs_targets = False

    def forward(self, context):
        return super().forward(context) * context.targets[0].any.abs().mean()


class Negative(Equal):
    def forward(self, context):
        return super().forward(context) - 1.5


class SeesMasked(Equal):
    def forward(self, context):
        strength = torch.stack([target.any.abs().mean((2, 3, 4)) for target in context.targets])
        return super().forward(context) * strength[..., None]
