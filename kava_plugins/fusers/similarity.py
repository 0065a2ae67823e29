"""Weigh teachers by how much the student's cache looks like theirs on average."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kava_core.errors import KavaError
from kava_core.kv.maths.masks import widen
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.fuser import FusionContext
from kava_plugins.fusers import SimilarityConfig
from kava_plugins.fusers._routing import mean_over_time, softmax_over_valid


class Similarity(nn.Module):
    """Softmax over teachers of cosine(query, prototype) / temperature, layer by layer.

    The query is the student's cache at a position, or its mean over an example; a teacher's prototype is the
    mean of its aligned cache over the calibration examples. All heads side by side, of the first compared
    part. Prototypes are fixed; no gradient reaches the student through its query.
    """

    needs_targets = False
    prototypes: Float[Tensor, "teacher layer dim"]
    count: Float[Tensor, " teacher"]
    ready: Bool[Tensor, ""]

    def __init__(self, config: SimilarityConfig, *, teachers: tuple[str, ...], student: Geometry) -> None:
        super().__init__()
        self.temperature, self.by_example = config.temperature, config.per == "example"
        width = student.head * student.dim
        self.register_buffer("prototypes", torch.zeros(len(teachers), student.layer, width))
        self.register_buffer("count", torch.zeros(len(teachers)))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self._checked = False

    def observe(self, context: FusionContext) -> None:
        """Add a batch to the sums of the teachers' aligned caches."""
        for teacher, (target, valid) in enumerate(zip(context.targets, context.valid, strict=True)):
            vectors = torch.where(valid[:, None, :, None], heads_side_by_side(target), 0)
            self.prototypes[teacher] += vectors.sum((0, 2)).to(self.prototypes)
            self.count[teacher] += valid.sum()

    def finish(self) -> None:
        """Divide the sums by their counts.

        Raises:
            KavaError: a teacher had no valid position.
        """
        if not (self.count > 0).all():
            raise KavaError("fuser similarity: a teacher had no valid position in the calibration examples")
        self.prototypes /= self.count[:, None, None]
        self.ready.fill_(True)

    def forward(self, context: FusionContext) -> Float[Tensor, "teacher batch layer time"]:
        """Return the teachers' weights; on the meta device, where only shapes matter, also before ``finish``.

        Raises:
            KavaError: used before calibration.
        """
        self._require_ready()
        query = heads_side_by_side(context.student).detach()
        if self.by_example:
            layers = rearrange(query, "batch layer time dim -> batch time (layer dim)")
            mean = mean_over_time(layers, context.valid.any(0))
            query = rearrange(mean, "batch 1 (layer dim) -> batch layer 1 dim", layer=query.shape[1])
        query = torch.nn.functional.normalize(query, dim=-1, eps=1e-10)
        prototypes = torch.nn.functional.normalize(self.prototypes.to(query), dim=-1, eps=1e-10)
        cosines = torch.einsum("bltd,kld->kblt", query, prototypes)
        scores = cosines / self.temperature
        teacher, batch, time = context.valid.shape
        return softmax_over_valid(scores.expand(teacher, batch, -1, time), context.valid)

    def _require_ready(self) -> None:
        # Remembered, because reading the flag waits for the device.
        if not self._checked and not self.ready.is_meta:
            if not self.ready:
                raise KavaError(
                    "fuser similarity: used before calibration; call observe() and finish() first"
                )
            self._checked = True


def heads_side_by_side(cache: Cache) -> Float[Tensor, "batch layer time dim"]:
    """Return the first part of a cache with all heads side by side, in float32 or better."""
    _, x = next(iter(cache.items()))
    return widen(rearrange(x, "batch layer head time dim -> batch layer time (head dim)"))
