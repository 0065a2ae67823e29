"""Mix heads with heads: every student head is a weighted mean of the teacher's heads.

The width of a head stays as it is; for any pair of head counts (12 → 2, 28 → 4, 8 → 32).
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.protocols.axes import Geometry
from kava_plugins.head_adapters import StructuredConfig


class Structured(nn.Module):
    """One mixing matrix for queries, and one for keys and values together or for each of them."""

    linear = True

    def __init__(self, config: StructuredConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.teacher_view = teacher.with_(head=student.head, qhead=student.qhead)
        self.student_view = student
        self.share_kv, self.learning_rate = config.share_kv, config.learning_rate
        parts: tuple[Part, ...] = ("keys", "queries") if config.share_kv else ("keys", "values", "queries")
        for order, part in enumerate(parts):
            mix = _initial_mix(config, teacher, student, part, seed=config.seed + order)
            _add_mix(self, f"{part}_mix", mix, trainable=config.trainable)
        self.layered = tuple(f"{part}_mix" for part in parts) if config.per_layer else ()

    def forward(
        self, x: Float[Tensor, "batch layer t_head time dim"], part: Part
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Return the mixed heads; ``x`` itself if the heads already agree."""
        owner = "keys" if part == "values" and self.share_kv else part
        mix = getattr(self, f"{owner}_mix")
        return x if mix is None else mix_heads(x, mix.to(x.dtype))

    def fold(
        self, x: Float[Tensor, "batch layer head time dim"]
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Return the student's own tensor."""
        return x


def mix_heads(
    x: Float[Tensor, "batch layer t_head time dim"], mix: Float[Tensor, "_ head t_head"]
) -> Float[Tensor, "batch layer head time dim"]:
    """Multiply the head axis of ``x`` by ``mix``, which is one for all layers or one each, in one product."""
    mixed = mix @ rearrange(x, "batch layer head time dim -> batch layer head (time dim)")
    return mixed.view(*x.shape[:2], mix.shape[1], *x.shape[3:])


def grouped_mix(t_head: int, head: int) -> Float[Tensor, "head t_head"]:
    """Average for student head i the teacher heads in ``[i · t_head / head, (i + 1) · t_head / head)``.

    A teacher head cut by a border counts with the part that is inside.
    """
    # In units of 1/head of a teacher head, so that all borders are whole numbers.
    begin = torch.arange(head)[:, None] * t_head
    t_begin = torch.arange(t_head) * head
    overlap = torch.minimum(begin + t_head, t_begin + head) - torch.maximum(begin, t_begin)
    return overlap.clamp_min(0).float() / t_head


def _initial_mix(
    config: StructuredConfig, teacher: Geometry, student: Geometry, part: Part, *, seed: int
) -> Float[Tensor, "_ head t_head"] | None:
    """Return the first mixing matrices; None if heads pass unchanged."""
    t_head, head = teacher.heads(part), student.heads(part)
    layer = student.layer if config.per_layer else 1
    if not head:  # queries that no loss compares
        return None
    if t_head == head and not config.trainable and (config.init == "grouped" or head == 1):
        return None
    if config.init == "grouped":
        return grouped_mix(t_head, head).expand(layer, -1, -1).clone()
    if config.init == "uniform":
        return torch.full((layer, head, t_head), 1 / t_head)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    positive = torch.rand(layer, head, t_head, generator=generator, device="cpu") + 1e-3
    return (positive / positive.sum(-1, keepdim=True)).to(torch.get_default_device())


def _add_mix(module: nn.Module, name: str, mix: Tensor | None, *, trainable: bool) -> None:
    if trainable and mix is not None:
        module.register_parameter(name, nn.Parameter(mix))
    else:
        module.register_buffer(name, mix, persistent=False)
