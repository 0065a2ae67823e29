"""A bottleneck: LayerNorm → Linear → SiLU → Dropout → Linear, as wide as the teacher is large."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.protocols.axes import PARTS, Geometry
from kava_plugins.dim_projectors import ElasticConfig
from kava_plugins.dim_projectors._matrices import normal, owners, project

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
        self.owner = owners(share_heads=config.share_heads, share_kv=config.share_kv)
        self.inside = max(1, round(_ratio(config, max(teacher.hidden, student.hidden)) * student.dim))
        for order, part in enumerate(PARTS):
            if self.owner[part] == part and teacher.heads(part):
                head = 1 if config.share_heads else teacher.heads(part)
                widths = (teacher.dim, self.inside, student.dim)
                self._attach(part, teacher.layer, head, widths, seed=config.seed + 2 * order)

        self.layered = tuple(name for name, _ in self.named_parameters())

    def _attach(self, part: Part, layer: int, head: int, widths: tuple[int, int, int], *, seed: int) -> None:
        """Parameters ``{part}_{down,up}`` and ``{part}_{down,up}_bias``."""
        for step, name in enumerate(("down", "up")):
            t_dim, dim = widths[step], widths[step + 1]
            matrix = normal((layer, head, dim, t_dim), seed=seed + step)
            self.register_parameter(f"{part}_{name}", nn.Parameter(matrix))
            self.register_parameter(f"{part}_{name}_bias", nn.Parameter(torch.zeros(layer, head, 1, dim)))

    def forward(
        self, x: Float[Tensor, "batch layer head time t_dim"], part: Part
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Every head's vectors through its bottleneck; dropout only while training."""
        owner = self.owner[part]
        normed = F.layer_norm(x, x.shape[-1:]).to(x.dtype)
        inside = F.silu(self._map(normed, f"{owner}_down"))
        return self._map(F.dropout(inside, self.dropout, self.training), f"{owner}_up")

    def _map(
        self, x: Float[Tensor, "batch layer head time t_dim"], name: str
    ) -> Float[Tensor, "batch layer head time dim"]:
        mapped = project(x, getattr(self, name))
        return mapped + getattr(self, f"{name}_bias").to(mapped.dtype)


def _ratio(config: ElasticConfig, hidden: int) -> float:
    """The given ratio; for ``auto`` the one of the teacher's size, or of this hidden width."""
    if config.mlp_ratio != "auto":
        return config.mlp_ratio
    size = config.teacher_size
    large = hidden >= LARGE_HIDDEN if size is None else size >= LARGE
    middle = hidden >= MIDDLE_HIDDEN if size is None else size >= MIDDLE
    return 2.0 if large else 1.0 if middle else 0.5
