"""Read the teacher layers whose representations are most similar, by debiased linear CKA."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kava_core.kv.maths.cka import StreamedCKA
from kava_core.protocols.axes import Geometry
from kava_plugins.layer_mappers import CkaConfig
from kava_plugins.layer_mappers._map_file import read_similarity
from kava_plugins.layer_mappers._window import mean_around, same_depth


class Cka(nn.Module):
    """Student layers read the ``top_k`` most similar teacher layers (CKA: arXiv 1905.00414).

    The weights are ``softmax(similarity / temperature)`` over those layers: a difference of ``temperature``
    is a factor of e, and similarities below 0, which debiased CKA has, need no special case. A student layer
    that resembles no teacher layer, and every layer before anything was measured, reads what ``ratio`` does.
    """

    on: Literal["hidden", "keys", "values"]
    matrix: Float[Tensor, "layer t_layer"]
    similarity: Float[Tensor, "layer t_layer"]
    measured: Bool[Tensor, ""]

    def __init__(self, config: CkaConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.on, self.skip = config.on, config.skip
        self.top_k, self.temperature = config.top_k, config.temperature
        self._unmeasured = mean_around(same_depth(teacher, student), teacher.layer, config.top_k)
        self.register_buffer("matrix", self._unmeasured.clone())
        self.register_buffer("similarity", torch.zeros_like(self.matrix))
        self.register_buffer("measured", torch.zeros((), dtype=torch.bool))
        self._stream = StreamedCKA(config.rows)
        if config.map is not None and not self.matrix.is_meta:
            self._set_similarity(read_similarity(config.map, config.on, teacher=teacher, student=student))

    def observe(
        self,
        teacher: Float[Tensor, "batch t_layer time t_dim"],
        student: Float[Tensor, "batch layer time dim"],
        valid: Bool[Tensor, "batch time"],
    ) -> None:
        """Take in the valid positions of a batch, except the first of every example.

        They are shuffled, always in the same way: a minibatch of neighbouring tokens would compare the inside
        of few texts.
        """
        counted = valid & (valid.cumsum(1) > self.skip)
        example_and_time = counted.nonzero()
        generator = torch.Generator().manual_seed(self._stream.seen)
        order = torch.randperm(len(example_and_time), generator=generator)
        example, time = example_and_time[order.to(example_and_time.device)].unbind(1)
        self._stream.add(teacher.transpose(0, 1)[:, example, time], student.transpose(0, 1)[:, example, time])

    def finish(self) -> None:
        """Compute similarities and weights from everything observed, and forget it.

        Raises:
            KavaError: fewer than 4 positions were observed.
        """
        self._set_similarity(self._stream.similarity())
        self._stream = StreamedCKA(self._stream.rows)

    def forward(self) -> Float[Tensor, "layer t_layer"]:
        """Return the constant weights, whose rows sum to 1."""
        return self.matrix

    def _set_similarity(self, similarity: Float[Tensor, "layer t_layer"]) -> None:
        weights = top_weights(similarity, self.top_k, self.temperature)
        resembles_any = similarity.amax(1, keepdim=True) > 0
        self.matrix.copy_(torch.where(resembles_any, weights, self._unmeasured))
        self.similarity.copy_(similarity)
        self.measured.fill_(True)


def top_weights(
    similarity: Float[Tensor, "layer t_layer"], top_k: int, temperature: float
) -> Float[Tensor, "layer t_layer"]:
    """Return ``softmax(similarity / temperature)`` over the ``top_k`` largest of each row, zero elsewhere.

    Of equal similarities the lower layers are taken. No chosen layer's weight is rounded to zero.
    """
    best, layers = similarity.float().sort(dim=1, descending=True, stable=True)
    weights = (best[:, :top_k] / temperature).softmax(1).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.zeros_like(best).scatter(1, layers[:, :top_k], weights)
