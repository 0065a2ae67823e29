"""Project through a bottleneck: LayerNorm → Linear → SiLU → Dropout → Linear, wider for larger teachers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.protocols.axes import PARTS, Geometry
from kava_plugins.dim_projectors import ElasticConfig
from kava_plugins.dim_projectors._matrices import apply_matrices, matrix_owners, normal_matrices

LARGE, MIDDLE = 70.0, 7.0
"""Billions of parameters from which the ratio is 2.0 and 1.0; below, it is 0.5."""

LARGE_HIDDEN, MIDDLE_HIDDEN = 8192, 3584
"""The same borders as widths of the residual stream: Llama 70B and Qwen2.5-72B have 8192, Qwen2.5-7B 3584."""


class Elastic(nn.Module):
    """One bottleneck for each layer, ``mlp_ratio`` times as wide inside as what comes out, at least 1.

    It serves all heads or one of them, keys and values together or one of them. The LayerNorm has no scale
    and shift of its own: the linear map behind it holds them. All layers and heads are one batched product.
    Without a ``teacher_size`` the wider of the two models counts as the teacher, in whichever direction the
    map runs.
    """

    def __init__(self, config: ElasticConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.learning_rate = config.learning_rate
        self.dropout = config.dropout
        self.owner = matrix_owners(share_heads=config.share_heads, share_kv=config.share_kv)
        ratio = _inner_ratio(config, max(teacher.hidden, student.hidden))
        self.inside = max(1, round(ratio * student.dim))
        for order, part in enumerate(PARTS):
            if self.owner[part] == part and teacher.heads(part):
                head = 1 if config.share_heads else teacher.heads(part)
                widths = (teacher.dim, self.inside, student.dim)
                self._add_bottleneck(part, teacher.layer, head, widths, seed=config.seed + 2 * order)

        self.layered = tuple(name for name, _ in self.named_parameters())

    def _add_bottleneck(
        self, part: Part, layer: int, head: int, widths: tuple[int, int, int], *, seed: int
    ) -> None:
        """Register the parameters ``{part}_{down,up}`` and ``{part}_{down,up}_bias``."""
        for step, name in enumerate(("down", "up")):
            t_dim, dim = widths[step], widths[step + 1]
            matrix = normal_matrices((layer, head, dim, t_dim), seed=seed + step)
            self.register_parameter(f"{part}_{name}", nn.Parameter(matrix))
            self.register_parameter(f"{part}_{name}_bias", nn.Parameter(torch.zeros(layer, head, 1, dim)))

    def forward(
        self, x: Float[Tensor, "batch layer head time t_dim"], part: Part
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Send every head's vectors through its bottleneck; dropout only while training."""
        owner = self.owner[part]
        normed = F.layer_norm(x, x.shape[-1:]).to(x.dtype)
        inside = F.silu(self._apply_step(normed, f"{owner}_down"))
        dropped = F.dropout(inside, self.dropout, self.training)
        return self._apply_step(dropped, f"{owner}_up")

    def _apply_step(
        self, x: Float[Tensor, "batch layer head time t_dim"], name: str
    ) -> Float[Tensor, "batch layer head time dim"]:
        mapped = apply_matrices(x, getattr(self, name))
        return mapped + getattr(self, f"{name}_bias").to(mapped.dtype)


def _inner_ratio(config: ElasticConfig, hidden: int) -> float:
    """Return the given ratio; for ``auto`` that of the teacher's size, or else of this hidden width."""
    if config.mlp_ratio != "auto":
        return config.mlp_ratio
    if config.teacher_size is not None:
        is_large, is_middle = config.teacher_size >= LARGE, config.teacher_size >= MIDDLE
    else:
        is_large, is_middle = hidden >= LARGE_HIDDEN, hidden >= MIDDLE_HIDDEN
    if is_large:
        return 2.0
    return 1.0 if is_middle else 0.5
