"""Compute a projection from data before training: principal components, a rotation or a regression.

A projector trained by the KV loss can absorb the mismatch, so that the loss falls and the student does not
move; one that was fixed beforehand cannot.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.errors import KavaError
from kava_core.kv.maths.moments import Moments, rows_of
from kava_core.protocols.axes import Geometry
from kava_plugins.dim_projectors import CalibratedConfig
from kava_plugins.dim_projectors._closed_form import principal_components, procrustes_map, ridge_map
from kava_plugins.dim_projectors._matrices import apply_matrices


class Calibrated(nn.Module):
    """``y = (x − mean) · basisᵀ + offset`` for each layer and head, each part apart.

    ``pca`` has no offset, and queries go through the keys' basis of their group and keep their mean: scores
    between projected queries and keys then differ from the teacher's only by what the basis leaves out and a
    constant per query, which a softmax removes. Where the student is wider, the other channels are zero.

    ``procrustes`` and ``ridge`` aim at the other side's cache as it is before training: its mean is the
    offset, and queries, where a loss compares them, are calibrated on the other side's queries. With a
    student that starts from random weights they are fits to noise.
    """

    linear = True
    ready: Bool[Tensor, " _"]

    def __init__(self, config: CalibratedConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.config, self.learning_rate = config, config.learning_rate
        self.paired = config.method != "pca"
        self.queries_from_keys = not self.paired
        own_queries = config.method != "pca" and teacher.qhead > 0
        self.parts: tuple[Part, ...] = ("keys", "values", "queries") if own_queries else ("keys", "values")
        for part in self.parts:
            head = teacher.heads(part) if config.per_head else 1
            self._add_tensors(part, teacher.layer, head, student.dim, teacher.dim)
        self.layered = tuple(name for name in self.state_dict())
        self.register_buffer("ready", torch.zeros(len(self.parts), dtype=torch.bool))
        self._seen: dict[Part, Moments] = {}
        self._checked: set[Part] = set()

    def _add_tensors(self, part: Part, layer: int, head: int, dim: int, t_dim: int) -> None:
        self.register_buffer(f"{part}_mean", torch.zeros(layer, head, t_dim))
        if self.config.method != "pca":
            self.register_buffer(f"{part}_offset", torch.zeros(layer, head, dim))
        basis = torch.zeros(layer, head, dim, t_dim)
        if self.config.trainable:
            self.register_parameter(f"{part}_basis", nn.Parameter(basis))
        else:
            self.register_buffer(f"{part}_basis", basis)

    def observe(
        self,
        x: Float[Tensor, "batch layer head time t_dim"],
        like: Float[Tensor, "batch layer head time dim"],
        valid: Bool[Tensor, "batch time"],
        part: Part,
    ) -> None:
        """Add the valid positions of one batch to the part's sums; ``pca`` needs no queries."""
        positions = int(valid.sum())
        if part not in self.parts or positions == 0:
            return
        rows = rows_of(x, valid, per_head=self.config.per_head)
        like_rows = rows_of(like, valid, per_head=self.config.per_head)
        moments = self._seen.get(part) or Moments.empty(rows, like_rows)
        self._seen[part] = moments.plus(rows, like_rows, positions)

    @torch.no_grad()
    def finish(self) -> None:
        """Compute the projection of every part that was observed, and forget the sums.

        Raises:
            KavaError: fewer than 2 valid positions were observed.
        """
        self._require_positions()
        for part, moments in self._seen.items():
            getattr(self, f"{part}_mean").copy_(moments.mean)
            getattr(self, f"{part}_basis").copy_(self._compute_basis(moments))
            if self.config.method != "pca":
                getattr(self, f"{part}_offset").copy_(moments.like_mean)
            self.ready[self.parts.index(part)] = True
        self._seen = {}

    def _compute_basis(self, moments: Moments) -> Float[Tensor, "layer head dim t_dim"]:
        if self.config.method == "pca":
            return principal_components(moments)
        if self.config.method == "procrustes":
            return procrustes_map(moments)
        return ridge_map(moments, self.config.ridge)

    def forward(
        self, x: Float[Tensor, "batch layer head time t_dim"], part: Part
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Project one part; on the meta device, where only shapes matter, also before calibration.

        Raises:
            KavaError: the part was not calibrated.
        """
        source: Part = part if part in self.parts else "keys"
        if not x.is_meta:
            self._require_ready(source)
        basis = getattr(self, f"{source}_basis")
        if source != part:
            group = x.shape[2] // basis.shape[1] if basis.shape[1] > 1 else 1
            return apply_matrices(x, basis.repeat_interleave(group, 1))
        # Subtracted before rounding: the mean of a channel can be much larger than its spread.
        centred = (x - getattr(self, f"{part}_mean")[:, :, None]).to(x.dtype)
        projected = apply_matrices(centred, basis)
        if self.config.method == "pca":
            return projected
        return (projected + getattr(self, f"{part}_offset")[:, :, None]).to(projected.dtype)

    def _require_positions(self) -> None:
        fewest = min((moments.positions for moments in self._seen.values()), default=0)
        if fewest < 2:
            raise KavaError(
                f"dim_projector calibrated: {fewest} valid positions were observed, at least 2 are needed; "
                "check train.calibration_examples and the time warper"
            )

    def _require_ready(self, part: Part) -> None:
        # Remembered, because reading the flag waits for the device.
        if part in self._checked:
            return
        if not self.ready[self.parts.index(part)]:
            raise KavaError(
                f"dim_projector calibrated: {part} used before calibration; call observe() and finish() first"
            )
        self._checked.add(part)
