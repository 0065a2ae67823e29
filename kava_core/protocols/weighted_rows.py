"""Compute weighted sums of rows, given by a sparse matrix in compressed sparse row (CSR) form."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def weighted_rows(
    x: Float[Tensor, "t_time dim"],
    index: Int[Tensor, " tap"],
    weight: Float[Tensor, " tap"],
    start: Int[Tensor, " _"],
    valid: Bool[Tensor, " time"],
) -> Float[Tensor, "time dim"]:
    """Sum for every row i ``weight[k] · x[index[k]]`` over k from ``start[i]`` up to ``start[i + 1]``.

    Rows that are not valid are zero, whatever their indices, and pass no gradient on. Differentiable in ``x``
    alone, any number of times.
    """
    result: Tensor = _WeightedRows.apply(x, index, weight, start, valid)
    return result


class _WeightedRows(torch.autograd.Function):
    """A CSR product whose gradient is the product with the transpose, again in CSR form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weight: Tensor, start: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(index, weight, start, valid)
        ctx.height = x.shape[0]
        rows = F.embedding_bag(
            index, x, start, mode="sum", per_sample_weights=weight, include_last_offset=True
        )
        # Not by weight 0: a NaN among the rows would come through.
        return rows.masked_fill_(~valid[:, None], 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        *matrix, valid = ctx.saved_tensors
        gradient = gradient.masked_fill(~valid[:, None], 0).contiguous()
        all_valid = valid.new_ones(ctx.height)
        transposed = _transpose_csr(ctx.height, *matrix)
        return weighted_rows(gradient, *transposed, all_valid), None, None, None, None


def _transpose_csr(
    height: int, index: Tensor, weight: Tensor, start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return index, weight and start of the transposed matrix of ``height`` rows, without host syncs."""
    column, order = torch.sort(index, stable=True)
    row = torch.repeat_interleave(start.diff(), output_size=index.numel())
    begins = torch.searchsorted(column, torch.arange(height + 1, device=index.device))
    return row[order], weight[order], begins
