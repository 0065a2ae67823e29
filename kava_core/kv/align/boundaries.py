"""Call each component through a thin function whose annotations state the contract of its kind.

With shape checking on, what a component returns is checked here, so a third-party component without a single
annotation is checked as well. ``attribute_errors_to`` adds to an error whose component raised it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from kava_core import shapecheck
from kava_core.config import ComponentConfig, Part
from kava_core.errors import PluginError
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.dim_projector import DimProjector
from kava_core.protocols.fuser import Fuser, FusionContext
from kava_core.protocols.head_adapter import HeadAdapter
from kava_core.protocols.kv_loss import KVLoss
from kava_core.protocols.layer_mapper import LayerMapper
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.time_warper import TimeWarper
from kava_core.protocols.timeline import Timeline
from kava_core.versions import distributor


@contextmanager
def attribute_errors_to(who: str, config: ComponentConfig | None = None) -> Iterator[None]:
    """Add a note to any exception raised inside that names the component and its distribution.

    Args:
        who: the component, for example ``"layer_mapper 'ratio', teacher 'big'"``.
        config: its declaration, by which the distribution is found; None: the note names none.
    """
    try:
        yield
    except Exception as error:
        error.add_note(f"in {who}{_distributor_note(config)}")
        raise


def _distributor_note(config: ComponentConfig | None) -> str:
    """``" (distribution version)"``; empty where no installed distribution holds the declaration."""
    if config is None:
        return ""
    distribution = distributor(type(config).__module__)
    return f" ({distribution})" if distribution else ""


def layer_matrix(
    mapper: LayerMapper, *, teacher: Geometry, student: Geometry
) -> Float[Tensor, "{student.layer} {teacher.layer}"]:
    """Return a layer mapper's weights: row i mixes student layer i from the teacher's layers."""
    return mapper()


def join_layers(
    x: Float[Tensor, "batch t_layer head time t_dim"], layer: int
) -> Float[Tensor, "batch {layer} head time dim"]:
    """Place each run of ``t_layer / layer`` neighbouring layers side by side along the width."""
    joined: Tensor = rearrange(
        x, "batch (layer tap) head time dim -> batch layer head time (tap dim)", layer=layer
    )
    return joined


def mix_layers(
    x: Float[Tensor, "batch t_layer head time dim"], matrix: Float[Tensor, "layer t_layer"]
) -> Float[Tensor, "batch layer head time dim"]:
    """Return each student layer as a weighted sum of teacher layers: ``t_layer → layer``."""
    return torch.einsum("ij,bjhtd->bihtd", matrix.to(x.dtype), x)


def adapt_heads(
    adapter: HeadAdapter,
    x: Float[Tensor, "batch _ t_head time t_dim"],
    part: Part,
    *,
    layer: int,
    head: int,
    dim: int,
) -> Float[Tensor, "batch {layer} {head} time {dim}"]:
    """Apply a head adapter: ``t_head → head``.

    Args:
        adapter: the component.
        x: the side that is mapped.
        part: keys, values or queries.
        layer: extent that must come out, as are ``head`` and ``dim``.
        head: likewise.
        dim: likewise.
    """
    return adapter(x, part)


def fold_heads(
    adapter: HeadAdapter, x: Float[Tensor, "batch _ _ time _"], *, layer: int, head: int, dim: int
) -> Float[Tensor, "batch {layer} {head} time {dim}"]:
    """Return the other side's tensor in the form the head adapter gives to both sides.

    Args:
        adapter: the component.
        x: the side that is not mapped.
        layer: extent that must come out, as are ``head`` and ``dim``.
        head: likewise.
        dim: likewise.
    """
    return adapter.fold(x)


def plan_time(warper: TimeWarper, teacher: Timeline, student: Timeline) -> TimeMap:
    """Plan the time map of a batch; its validity has the student's extents ``batch time``.

    Raises:
        PluginError: the warper returns something else than a ``TimeMap``.
    """
    time_map = warper(teacher, student)
    if not isinstance(time_map, TimeMap):
        raise PluginError(f"must return a TimeMap, not {type(time_map).__name__}")
    _same_extent(time_map.valid, student.mask)
    return time_map


def _same_extent(valid: Bool[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]) -> None:
    """Holds both tensors to one ``batch time``; the annotations are the check."""


def warp_time(
    time_map: TimeMap, x: Float[Tensor, "batch layer head t_time dim"], *, time: int
) -> Float[Tensor, "batch layer head {time} dim"]:
    """Apply a time map: ``t_time → time``."""
    return time_map.apply(x)


def project_dim(
    projector: DimProjector, x: Float[Tensor, "batch layer head time t_dim"], part: Part, *, dim: int
) -> Float[Tensor, "batch layer head time {dim}"]:
    """Apply a dim projector: ``t_dim → dim``."""
    return projector(x, part)


def raw_fuser_weights(
    fuser: Fuser, context: FusionContext, *, teacher: int, layer: int
) -> Float[Tensor, "{teacher} batch {layer} time"]:
    """Return the weights that a fuser gives to the teachers, before they are normalised."""
    return fuser(context)


def teacher_weights(
    fuser: Fuser, context: FusionContext, valid: Bool[Tensor, "teacher batch time"], *, layer: int
) -> Float[Tensor, "teacher batch {layer} time"]:
    """Return a fuser's weights, normalised over the teachers valid at each position; 0 where none is valid.

    Args:
        fuser: the component.
        context: what it may look at.
        valid: where each teacher has a target.
        layer: number of compared layers.

    Raises:
        PluginError: the weights have another shape, or some are negative.
    """
    weights = raw_fuser_weights(fuser, context, teacher=valid.shape[0], layer=layer)
    teacher, batch, time = valid.shape
    require_shape(weights, (teacher, batch, layer, time), "teacher batch layer time")
    # The values of a GPU's tensor are waited for in debug mode alone.
    has_values_at_hand = weights.device.type == "cpu" or (shapecheck.active() and not weights.is_meta)
    if has_values_at_hand and bool((weights < 0).any()):
        raise PluginError(f"weights must be at least 0, not {float(weights.min()):.3g}")
    weights = weights.masked_fill(~valid[:, :, None], 0)
    total = weights.sum(0, keepdim=True)
    return torch.where(total > 0, weights / total.masked_fill(total == 0, 1), 0)


def fuse_targets(
    targets: Float[Tensor, "teacher batch layer head time dim"],
    weights: Float[Tensor, "teacher batch layer time"],
) -> Float[Tensor, "batch layer head time dim"]:
    """Return the weighted sum of all teachers' targets; where a weight is 0, a target may hold NaN."""
    spread = weights[:, :, :, None, :, None].to(targets.dtype)
    return (torch.where(spread > 0, targets, 0) * spread).sum(0)


def summed_loss(
    loss: KVLoss, student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"]
) -> Float[Tensor, ""]:
    """Return a loss as one number: its values, weighted and summed over positions and layers."""
    return loss(student, target, weight)


def require_shape(x: Tensor, extents: Sequence[int], axes: str) -> Tensor:
    """Return ``x`` unchanged if it has this shape.

    Args:
        x: what a component returned.
        extents: the shape it must have.
        axes: names of the axes, separated by blanks, for the error.

    Raises:
        PluginError: ``x`` has another shape.
    """
    if tuple(x.shape) != tuple(extents):
        wanted = ", ".join(f"{axis} {extent}" for axis, extent in zip(axes.split(), extents, strict=True))
        raise PluginError(f"returned shape {list(x.shape)}, must be {list(extents)} ({wanted})")
    return x
