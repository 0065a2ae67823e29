"""Choose which teacher layers are captured, and combine them into the student's: ``t_layer → layer``."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.errors import PluginError, SpecError
from kava_core.kv.align.boundaries import join_layers, layer_matrix, mix_layers
from kava_core.kv.align.returned import require_device, require_means
from kava_core.protocols.axes import Geometry
from kava_core.protocols.layer_mapper import LayerMapper


class LayerMap(nn.Module):
    """Applies a layer mapper to a cache that holds only the layers it reads.

    Args:
        mapper: the component.
        teacher: the teacher's geometry.
        student: the student's geometry.
        layers: student layers that are wanted.
        combine: several teacher layers for one student layer: their weighted mean, or side by side along
            the width, which becomes ``joined`` times as wide.

    Raises:
        PluginError: a wanted layer reads no teacher layer.
        SpecError: layers are to be joined along the width, and the mapper learns its weights or reads more
            of them for one student layer than for another.
    """

    rows: Tensor
    columns: Tensor
    pick: Tensor

    def __init__(
        self,
        mapper: LayerMapper,
        *,
        teacher: Geometry,
        student: Geometry,
        layers: tuple[int, ...],
        combine: Literal["mean", "concat"] = "mean",
    ) -> None:
        super().__init__()
        self.mapper = mapper
        self.learned = any(parameter.requires_grad for parameter in mapper.parameters())
        self.register_buffer("rows", torch.tensor(layers, dtype=torch.long), persistent=False)
        with torch.no_grad():
            whole = layer_matrix(mapper, teacher=teacher, student=student)
            if whole.is_meta:
                raise PluginError("returned a tensor on meta, must hold numbers")
            matrix = whole[list(layers)]
        self.teacher, self.student = teacher, student
        require_means(matrix, layers, may_be_empty=True)
        self.sources = self._sources(matrix, layers)
        self.register_buffer("columns", torch.tensor(self.sources, dtype=torch.long), persistent=False)
        matrix = matrix[:, list(self.sources)]
        self.joined = self._read_by_each(matrix) if combine == "concat" else 1
        picks_one_layer = bool((matrix.ne(0).sum(1) == 1).all() and (matrix.amax(1) == 1).all())
        self.single = combine == "concat" or (not self.learned and picks_one_layer)
        order = matrix.ne(0).nonzero()[:, 1] if self.single else matrix.argmax(1)
        self.register_buffer("pick", order, persistent=False)
        self.whole = self.single and self.pick.tolist() == list(range(len(self.sources)))
        self.reads = self._reads(matrix)

    def _sources(self, matrix: Float[Tensor, "layer t_layer"], layers: tuple[int, ...]) -> tuple[int, ...]:
        if self.learned:
            return tuple(range(matrix.shape[1]))
        has_source = matrix.ne(0).any(1).tolist()
        empty = [layer for layer, reads in zip(layers, has_source, strict=True) if not reads]
        if empty:
            raise PluginError(f"student layers {empty} read no teacher layer; choose others with 'layers'")
        return tuple(matrix.ne(0).any(0).nonzero().flatten().tolist())

    def _read_by_each(self, matrix: Float[Tensor, "layer t_layer"]) -> int:
        """Return how many teacher layers every student layer reads."""
        if self.learned:
            raise SpecError("layers: concat needs a layer mapper with fixed layers; this one learns weights")
        counts = matrix.ne(0).sum(1).tolist()
        if len(set(counts)) > 1:
            raise SpecError(f"layers: concat needs equally many teacher layers for each layer, not {counts}")
        return int(counts[0])

    def _reads(self, matrix: Float[Tensor, "layer t_layer"]) -> tuple[tuple[int, ...], ...]:
        """List, for every wanted layer, the indices among the sources of the teacher layers it reads."""
        if self.learned:
            return (tuple(range(len(self.sources))),) * len(matrix)
        if self.single:
            return tuple(map(tuple, self.pick.view(len(matrix), self.joined).tolist()))
        return tuple(tuple(row.nonzero().flatten().tolist()) for row in matrix)

    def _current_matrix(self, x: Tensor) -> Float[Tensor, "layer t_layer"]:
        """Return the rows of all wanted student layers, which read captured layers alone."""
        matrix = layer_matrix(self.mapper, teacher=self.teacher, student=self.student)
        require_device(matrix, x.device)
        matrix = matrix.index_select(0, self.rows)
        # A weight of a layer that was not captured would be lost.
        require_means(matrix.index_select(1, self.columns), self.rows)
        return matrix

    def mix_row(
        self, x: Float[Tensor, "batch t_layer head time _"], row: int
    ) -> Float[Tensor, "batch 1 head time dim"]:
        """Return a single student layer.

        Args:
            x: the teacher layers in ``reads[row]``, in that order.
            row: the student layer's index among the wanted ones.
        """
        if self.single:
            return x if self.joined == 1 else join_layers(x, 1)
        columns = self.columns[list(self.reads[row])]
        return mix_layers(x, self._current_matrix(x)[row][columns][None])

    def forward(
        self, x: Float[Tensor, "batch t_layer head time _"]
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Return all wanted student layers; ``x`` holds the teacher layers in ``sources``, in that order."""
        if not self.single:
            return mix_layers(x, self._current_matrix(x).index_select(1, self.columns))
        if not self.whole:
            x = x.index_select(1, self.pick)
        return x if self.joined == 1 else join_layers(x, len(self.rows))
