"""A projection computed from data before training: principal components of the teacher's keys and values.

A projector trained by the KV loss can absorb the mismatch, so that the loss falls and the student does not
move; one that was fixed beforehand cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.errors import KavaError
from kava_core.kv.axes import Geometry
from kava_plugins.dim_projectors import Calibrated as Config
from kava_plugins.dim_projectors.linear import project

CALIBRATED_PARTS: tuple[Part, ...] = ("keys", "values")


class Calibrated(nn.Module):
    """``y = (x − mean) · basisᵀ`` for each layer and head, keys and values apart.

    Queries go through the keys' basis of their group and keep their mean: scores between projected queries
    and keys then differ from the teacher's only by what the basis leaves out and a constant per query, which
    a softmax removes. Where the student is wider, the other channels are zero.
    """

    linear = True
    ready: Bool[Tensor, " 2"]

    def __init__(self, config: Config, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.per_head, self.dim = config.per_head, student.dim
        head = teacher.head if config.per_head else 1
        for part in CALIBRATED_PARTS:
            basis = torch.zeros(teacher.layer, head, student.dim, teacher.dim)
            self.register_buffer(f"{part}_mean", torch.zeros(teacher.layer, head, teacher.dim))
            if config.trainable:
                self.register_parameter(f"{part}_basis", nn.Parameter(basis))
            else:
                self.register_buffer(f"{part}_basis", basis)
        self.register_buffer("ready", torch.zeros(2, dtype=torch.bool))
        self._seen: dict[Part, _Moments] = {}
        self._checked: set[Part] = set()

    def observe(
        self,
        x: Float[Tensor, "batch layer head time t_dim"],
        valid: Bool[Tensor, "batch time"],
        part: Part,
    ) -> None:
        """Add the valid positions of a batch to the part's sums; queries need none of their own."""
        if part not in CALIBRATED_PARTS:
            return
        rows = rearrange(x.detach(), "batch layer head time dim -> layer head batch time dim")[:, :, valid]
        if not self.per_head:
            rows = rearrange(rows, "layer head time dim -> layer 1 (head time) dim")
        moments = _Moments.of(rows.double(), positions=int(valid.sum()))
        self._seen[part] = self._seen[part] + moments if part in self._seen else moments

    @torch.no_grad()
    def finish(self) -> None:
        """Compute mean and basis of every part that was observed, and forget the sums.

        KavaError with fewer than 2 valid positions.
        """
        self._require_positions()
        for part, moments in self._seen.items():
            mean, basis = principal_components(moments, self.dim)
            getattr(self, f"{part}_mean").copy_(mean)
            getattr(self, f"{part}_basis").copy_(basis)
            self.ready[CALIBRATED_PARTS.index(part)] = True
        self._seen = {}

    def forward(
        self, x: Float[Tensor, "batch layer head time t_dim"], part: Part
    ) -> Float[Tensor, "batch layer head time dim"]:
        """The projected part; KavaError before calibration (on the meta device only shapes matter)."""
        source: Part = "keys" if part == "queries" else part
        if not x.is_meta:
            self._require_ready(source)
        basis = getattr(self, f"{source}_basis")
        if part == "queries":
            group = x.shape[2] // basis.shape[1] if basis.shape[1] > 1 else 1
            return project(x, basis.repeat_interleave(group, 1))
        mean = getattr(self, f"{source}_mean")
        # Subtracted before rounding: the mean of a channel can be much larger than its spread.
        return project((x - mean[:, :, None]).to(x.dtype), basis)

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
        if not self.ready[CALIBRATED_PARTS.index(part)]:
            raise KavaError(
                f"dim_projector calibrated: {part} used before calibration; call observe() and finish() first"
            )
        self._checked.add(part)


@dataclass(frozen=True)
class _Moments:
    """Sums over rows, in float64."""

    positions: int
    rows: int
    total: Float[Tensor, "layer head t_dim"]
    outer: Float[Tensor, "layer head t_dim t_dim"]

    @classmethod
    def of(cls, rows: Float[Tensor, "layer head time t_dim"], positions: int) -> _Moments:
        return cls(positions, rows.shape[2], rows.sum(2), rows.mT @ rows)

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(
            self.positions + other.positions,
            self.rows + other.rows,
            self.total + other.total,
            self.outer + other.outer,
        )


def principal_components(
    moments: _Moments, dim: int
) -> tuple[Float[Tensor, "layer head t_dim"], Float[Tensor, "layer head dim t_dim"]]:
    """Mean and the ``dim`` directions of largest variance; the largest entry of each is positive.

    Rows beyond the teacher's width are zero.
    """
    mean = moments.total / moments.rows
    covariance = moments.outer / moments.rows - mean[..., :, None] * mean[..., None, :]
    directions = torch.linalg.eigh(covariance).eigenvectors.mT.flip(-2)[..., :dim, :]
    largest = directions.gather(-1, directions.abs().argmax(-1, keepdim=True))
    basis = torch.zeros(*mean.shape[:2], dim, mean.shape[-1], dtype=mean.dtype, device=mean.device)
    basis[..., : directions.shape[-2], :] = directions * largest.sign()
    return mean, basis
