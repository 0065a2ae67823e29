"""Compute the divergence of attention rows by Triton kernels, for float32 on CUDA.

Checked in Triton's interpreter only; not run on a GPU yet. Both sides' products are in registers, tile by
tile: the forward pass keeps two log-sums a row, the backward pass makes the products again. ``q`` is the side
on the right of KL(p ‖ q); the reverse divergence swaps the sides.
"""

# ruff: noqa: N803 - constants of a kernel are written in capitals

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kava_plugins.kv_losses import Divergence
from kava_plugins.kv_losses._row_blocks import Masking, Side

ROWS, KEYS = 64, 64
"""Extents of a tile."""

NARROWEST = 16
"""Tensor cores multiply no narrower matrices."""


def fused_divergence(mine: Side, theirs: Side, weight: Tensor, masking: Masking, kind: Divergence) -> Tensor:
    """Compute the same as ``_attention_divergence.portable_divergence``."""
    weight = weight / mine.queries.shape[1]
    orders = {"forward": [(mine, theirs)], "reverse": [(theirs, mine)]}
    orders["jeffreys"] = orders["forward"] + orders["reverse"]
    terms = []
    for q, p in orders[kind]:
        tensors = (q.queries * q.scale, q.keys, p.queries * p.scale, p.keys)
        terms.append(_FusedDivergence.apply(*tensors, weight, masking))  # type: ignore[no-untyped-call]
    return torch.stack(terms).sum()


class _FusedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, p_q: Tensor, p_k: Tensor, weight: Tensor, masking: Masking
    ) -> Tensor:
        sides = [x.contiguous() for x in (q, k, p_q, p_k)]
        live = weight if masking.live is None else masking.live.to(torch.int8).contiguous()
        sums = [q.new_zeros(q.shape[:3]) for _ in range(3)]
        ctx.launch = _KernelLauncher(q, k, p_q, p_k, masking)
        if q.numel():
            ctx.launch(_compare_rows, ROWS, *sides, live, *sums)
        ctx.save_for_backward(*sides, live, *sums, weight)
        return torch.where(weight[:, None] != 0, sums[2] * weight[:, None], 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *saved, weight = ctx.saved_tensors
        shares = (weight * gradient).contiguous()
        q, k, p_q, p_k = saved[:4]
        wants = {"WANT_Q": any(ctx.needs_input_grad[:2]), "WANT_P": any(ctx.needs_input_grad[2:4])}
        by_queries = [torch.zeros_like(x) for x in (q, p_q)]
        by_keys = [torch.zeros_like(x) for x in (q, p_q)]
        if q.numel():
            ctx.launch(_queries_gradient, ROWS, *saved, shares, *by_queries, **wants)
            ctx.launch(_keys_gradient, KEYS, *saved, shares, *by_keys, **wants)
        gradients: list[Tensor | None] = []
        for own_keys, wanted, d_queries, d_keys in zip(
            (k, p_k), wants.values(), by_queries, by_keys, strict=True
        ):
            # Query heads that share a key head each hold a part of its gradient.
            summed = torch.zeros_like(own_keys)
            if q.numel():
                summed = d_keys.unflatten(1, (own_keys.shape[1], -1)).sum(2)
            gradients += [d_queries, summed] if wanted else [None, None]
        d_weight = None
        if ctx.needs_input_grad[4]:
            d_weight = torch.where(weight != 0, saved[7].sum(1), 0) * gradient
        return *gradients, d_weight, None


class _KernelLauncher:
    """Starts a kernel with what all of them share: extents, and one program for each block and query head."""

    def __init__(self, q: Tensor, k: Tensor, p_q: Tensor, p_k: Tensor, masking: Masking) -> None:
        self.batch, qhead, self.time, dim = q.shape
        t_dim = p_q.shape[3]
        self.extents = (self.time, qhead, k.shape[1], p_k.shape[1], dim, t_dim)
        self.qhead = qhead
        self.constants = {
            "DIM": max(NARROWEST, triton.next_power_of_2(dim)),
            "T_DIM": max(NARROWEST, triton.next_power_of_2(t_dim)),
            "CAUSAL": masking.causal,
            "HOLES": masking.live is not None,
            "ROWS": ROWS,
            "KEYS": KEYS,
        }

    def __call__(self, kernel: Any, block: int, *tensors: Tensor, **constants: bool) -> None:
        grid = (triton.cdiv(self.time, block), self.batch * self.qhead)
        kernel[grid](*tensors, *self.extents, **self.constants, **constants)


def _triton_kernel(function: Callable[..., Any]) -> Any:
    """Make a function a Triton kernel. Triton reads source and globals, so shape checks must not wrap it."""
    return triton.jit(unwrap(function))


@_triton_kernel
def _load_vectors(x, head, at, time, dim, WIDTH: tl.constexpr):
    """Load the vectors ``at`` positions of a head as ``[positions, WIDTH]``, zero beyond its ends."""
    column = tl.arange(0, WIDTH)
    place = (head * time + at)[:, None] * dim + column[None]
    return tl.load(x + place, mask=(at < time)[:, None] & (column < dim)[None], other=0.0)


@_triton_kernel
def _store_vectors(x, values, head, at, time, dim, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    place = (head * time + at)[:, None] * dim + column[None]
    tl.store(x + place, values, mask=(at < time)[:, None] & (column < dim)[None])


@_triton_kernel
def _counted_products(live, batch, row, key, time, CAUSAL: tl.constexpr, HOLES: tl.constexpr):
    """Return which products of a tile count."""
    counts = (row < time)[:, None] & (key < time)[None]
    if HOLES:
        counts = counts & (tl.load(live + batch * time + key, mask=key < time, other=0) != 0)[None]
    if CAUSAL:
        counts = counts & (key[None] <= row[:, None])
    return counts


@_triton_kernel
def _products(queries, keys):
    return tl.dot(queries, tl.trans(keys), input_precision="ieee")


@_triton_kernel
def _compare_rows(
    q, k, p_q, p_k, live, q_sums, p_sums, each, time, qhead, head, t_head, dim, t_dim,
    DIM: tl.constexpr, T_DIM: tl.constexpr, CAUSAL: tl.constexpr, HOLES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Store log-sums of both sides and the divergence of each row of one block of one query head."""
    block, place = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, h = place // qhead, place % qhead
    row = block * ROWS + tl.arange(0, ROWS)
    mine, theirs = (
        _load_vectors(q, place, row, time, dim, DIM),
        _load_vectors(p_q, place, row, time, t_dim, T_DIM),
    )
    key_head = batch * head + h // (qhead // head)
    t_key_head = batch * t_head + h // (qhead // t_head)
    q_top = tl.full([ROWS], -1e30, tl.float32)
    p_top = tl.full([ROWS], -1e30, tl.float32)
    q_sum = tl.zeros([ROWS], tl.float32)
    p_sum = tl.zeros([ROWS], tl.float32)
    gap = tl.zeros([ROWS], tl.float32)
    end = tl.minimum(time, (block + 1) * ROWS) if CAUSAL else time
    for first in range(0, end, KEYS):
        key = first + tl.arange(0, KEYS)
        counts = _counted_products(live, batch, row, key, time, CAUSAL, HOLES)
        a = tl.where(counts, _products(mine, _load_vectors(k, key_head, key, time, dim, DIM)), -1e30)
        b = tl.where(
            counts, _products(theirs, _load_vectors(p_k, t_key_head, key, time, t_dim, T_DIM)), -1e30
        )
        q_now, p_now = tl.maximum(q_top, tl.max(a, 1)), tl.maximum(p_top, tl.max(b, 1))
        q_part = tl.where(counts, tl.exp(a - q_now[:, None]), 0.0)
        p_part = tl.where(counts, tl.exp(b - p_now[:, None]), 0.0)
        shrink = tl.exp(p_top - p_now)
        # gap is Σ p · ((b − p_top) − (a − q_top)): when the tops move, so does every difference summed so far
        gap = (gap + p_sum * ((p_top - p_now) - (q_top - q_now))) * shrink
        gap += tl.sum(p_part * ((b - p_now[:, None]) - (a - q_now[:, None])), 1)
        p_sum = p_sum * shrink + tl.sum(p_part, 1)
        q_sum = q_sum * tl.exp(q_top - q_now) + tl.sum(q_part, 1)
        q_top, p_top = q_now, p_now
    some = p_sum > 0
    q_sum, p_sum = tl.where(some, q_sum, 1.0), tl.where(some, p_sum, 1.0)
    found = tl.where(some, gap / p_sum - tl.log(p_sum / q_sum), 0.0)
    to = place * time + row
    tl.store(q_sums + to, q_top + tl.log(q_sum), mask=row < time)
    tl.store(p_sums + to, p_top + tl.log(p_sum), mask=row < time)
    tl.store(each + to, found, mask=row < time)


@_triton_kernel
def _product_derivatives(a, b, q_sum, p_sum, each, weight, counts):
    """Return the derivatives of Σ weight × divergence by the products of both sides."""
    q_log, p_log = a - q_sum[:, None], b - p_sum[:, None]
    q_share = tl.where(counts, tl.exp(tl.where(counts, q_log, 0.0)), 0.0)
    p_share = tl.where(counts, tl.exp(tl.where(counts, p_log, 0.0)), 0.0)
    by_q = (q_share - p_share) * weight[:, None]
    by_p = p_share * (p_log - q_log - each[:, None]) * weight[:, None]
    return by_q, by_p


@_triton_kernel
def _queries_gradient(
    q, k, p_q, p_k, live, q_sums, p_sums, each, weights, d_q, d_p, time, qhead, head, t_head, dim, t_dim,
    DIM: tl.constexpr, T_DIM: tl.constexpr, CAUSAL: tl.constexpr, HOLES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WANT_Q: tl.constexpr, WANT_P: tl.constexpr,
):  # fmt: skip
    """Store the gradients of one block of queries of one query head, over its keys."""
    block, place = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, h = place // qhead, place % qhead
    row = block * ROWS + tl.arange(0, ROWS)
    mine, theirs = (
        _load_vectors(q, place, row, time, dim, DIM),
        _load_vectors(p_q, place, row, time, t_dim, T_DIM),
    )
    q_sum = tl.load(q_sums + place * time + row, mask=row < time, other=0.0)
    p_sum = tl.load(p_sums + place * time + row, mask=row < time, other=0.0)
    one = tl.load(each + place * time + row, mask=row < time, other=0.0)
    weight = tl.load(weights + batch * time + row, mask=row < time, other=0.0)
    key_head = batch * head + h // (qhead // head)
    t_key_head = batch * t_head + h // (qhead // t_head)
    by_q = tl.zeros([ROWS, DIM], tl.float32)
    by_p = tl.zeros([ROWS, T_DIM], tl.float32)
    end = tl.minimum(time, (block + 1) * ROWS) if CAUSAL else time
    for first in range(0, end, KEYS):
        key = first + tl.arange(0, KEYS)
        counts = _counted_products(live, batch, row, key, time, CAUSAL, HOLES)
        keys, t_keys = (
            _load_vectors(k, key_head, key, time, dim, DIM),
            _load_vectors(p_k, t_key_head, key, time, t_dim, T_DIM),
        )
        a, b = _products(mine, keys), _products(theirs, t_keys)
        s, t = _product_derivatives(a, b, q_sum, p_sum, one, weight, counts)
        if WANT_Q:
            by_q += tl.dot(s, keys, input_precision="ieee")
        if WANT_P:
            by_p += tl.dot(t, t_keys, input_precision="ieee")
    if WANT_Q:
        _store_vectors(d_q, by_q, place, row, time, dim, DIM)
    if WANT_P:
        _store_vectors(d_p, by_p, place, row, time, t_dim, T_DIM)


@_triton_kernel
def _keys_gradient(
    q, k, p_q, p_k, live, q_sums, p_sums, each, weights, d_q, d_p, time, qhead, head, t_head, dim, t_dim,
    DIM: tl.constexpr, T_DIM: tl.constexpr, CAUSAL: tl.constexpr, HOLES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WANT_Q: tl.constexpr, WANT_P: tl.constexpr,
):  # fmt: skip
    """Store one query head's share of the gradients of a block of keys; the caller sums a group's heads."""
    block, place = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, h = place // qhead, place % qhead
    key = block * KEYS + tl.arange(0, KEYS)
    key_head = batch * head + h // (qhead // head)
    t_key_head = batch * t_head + h // (qhead // t_head)
    keys, t_keys = (
        _load_vectors(k, key_head, key, time, dim, DIM),
        _load_vectors(p_k, t_key_head, key, time, t_dim, T_DIM),
    )
    by_q = tl.zeros([KEYS, DIM], tl.float32)
    by_p = tl.zeros([KEYS, T_DIM], tl.float32)
    begin = block * KEYS // ROWS * ROWS if CAUSAL else 0
    for first in range(begin, time, ROWS):
        row = first + tl.arange(0, ROWS)
        mine, theirs = (
            _load_vectors(q, place, row, time, dim, DIM),
            _load_vectors(p_q, place, row, time, t_dim, T_DIM),
        )
        q_sum = tl.load(q_sums + place * time + row, mask=row < time, other=0.0)
        p_sum = tl.load(p_sums + place * time + row, mask=row < time, other=0.0)
        one = tl.load(each + place * time + row, mask=row < time, other=0.0)
        weight = tl.load(weights + batch * time + row, mask=row < time, other=0.0)
        counts = _counted_products(live, batch, row, key, time, CAUSAL, HOLES)
        s, t = _product_derivatives(
            _products(mine, keys), _products(theirs, t_keys), q_sum, p_sum, one, weight, counts
        )
        if WANT_Q:
            by_q += tl.dot(tl.trans(s), mine, input_precision="ieee")
        if WANT_P:
            by_p += tl.dot(tl.trans(t), theirs, input_precision="ieee")
    if WANT_Q:
        _store_vectors(d_q, by_q, place, key, time, dim, DIM)
    if WANT_P:
        _store_vectors(d_p, by_p, place, key, time, t_dim, T_DIM)
