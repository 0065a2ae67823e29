"""Call each component through a thin function that states, and checks, the contract of its kind.

What a component returns is checked here, so a third-party component without a single annotation is checked as
well. ``attribute_errors_to`` adds to an error whose component raised it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kava_core.config import ComponentConfig, Part
from kava_core.errors import NonFiniteError, PluginError, failing_frame, is_request_to_stop, one_line
from kava_core.kv.align.finite import noted_faults, raise_if, raise_unread_faults
from kava_core.kv.align.returned import (
    require_device,
    require_finite_loss,
    require_floats,
    require_like,
    require_shape,
    require_time_map,
    require_weights,
)
from kava_core.kv.align.watched_call import (
    call_component,
    require_attached,
    require_loss_attached,
    unchanged_inputs,
)
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.dim_projector import DimProjector
from kava_core.protocols.fuser import Chooses, Fuser, FusionContext, Regularised
from kava_core.protocols.head_adapter import HeadAdapter
from kava_core.protocols.kv_loss import KVLoss
from kava_core.protocols.layer_mapper import LayerMapper
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.time_warper import Evictor, TimeWarper
from kava_core.protocols.timeline import Timeline
from kava_core.versions import distributor

AXES = "batch layer head time dim"


@contextmanager
def attribute_errors_to(who: str, config: ComponentConfig | None = None) -> Iterator[None]:
    """Add a note to any exception raised inside that names the component and its distribution.

    What is no ``Exception``, as ``SystemExit``, becomes a ``PluginError``, and so does ``StopIteration``: a
    component cannot end kava. Ctrl-C still does; a ``raise KeyboardInterrupt`` of the component's own does
    not.

    Args:
        who: the component, for example ``"layer_mapper 'ratio', teacher 'big'"``.
        config: its declaration, by which the distribution is found; None: the note names none.

    Raises:
        PluginError: in place of what is no ``Exception``.
    """

    def make_note() -> str:
        return f"in {who}{_distributor_note(config)}"

    try:
        with noted_faults(make_note):
            yield
    except BaseException as error:
        if is_request_to_stop(error):
            raise
        explained = _explained_fault(error, config)
        explained.add_note(make_note())
        if explained is error:
            raise
        raise explained from error


def _explained_fault(error: BaseException, config: ComponentConfig | None) -> BaseException:
    """Return the error itself, or a ``PluginError`` in its place if it would be misunderstood further up."""
    complaint = _complaint_about_arguments(error)
    if complaint is not None:
        return PluginError(complaint)
    # Python gives StopIteration a meaning of its own on its way through a generator.
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    package = "" if config is None else type(config).__module__.partition(".")[0]
    return PluginError(f"raised {one_line(error)} at {failing_frame(error, package)}")


def _complaint_about_arguments(error: BaseException) -> str | None:
    """Return what a component gave to something of kava's, if debug mode's checker refused it there.

    The checker names a function of kava's, which the component's author never saw. None for other errors.
    """
    text = str(error)
    subject = _CHECKED_IN_KAVA.match(text)
    given, wanted = _GIVEN.search(text), _WANTED.search(text)
    if subject is None or given is None or wanted is None:
        return None
    argument = _ARGUMENT.search(text)
    what = subject[1].rpartition(".")[2] + (f" {argument[1]}" if argument else "")
    axes = ", ".join(dict.fromkeys(_BOUND_AXIS.findall(text)))
    return f"gave {what} {given[1]}, must be {wanted[1]}" + (f" ({axes})" if axes else "")


_CHECKED_IN_KAVA = re.compile(
    r"Type-check error whilst checking the (?:parameters|return value) of "
    r"kava_core\.([\w.]+?)(?:\.__init__)?\.\n"
)
_GIVEN = re.compile(r"Actual value: (.*)")
_WANTED = re.compile(r"Expected type: (?:<class ')?(.*?)(?:'>)?\.?$", re.MULTILINE)
_ARGUMENT = re.compile(r"typechecking parameter '(\w+)'")
_BOUND_AXIS = re.compile(r"^\w+ ?= ?\d+$", re.MULTILINE)


def _distributor_note(config: ComponentConfig | None) -> str:
    """``" (distribution version)"``; empty where no installed distribution holds the declaration."""
    if config is None:
        return ""
    distribution = distributor(type(config).__module__)
    return f" ({distribution})" if distribution else ""


def build_component(config: ComponentConfig, **runtime: Any) -> Any:
    """Import and construct a component.

    Raises:
        PluginError: it cannot be imported, or is no ``torch.nn.Module``.
    """
    component = config.build(**runtime)
    if not isinstance(component, nn.Module):
        raise PluginError(f"must be a torch.nn.Module, not {type(component).__name__}")
    return component


def views_of(adapter: HeadAdapter) -> tuple[Geometry, Geometry]:
    """Return the extents of both sides after a head adapter: the mapped side, and the other.

    Raises:
        PluginError: one of them is no ``Geometry``.
    """
    for name in ("teacher_view", "student_view"):
        view = getattr(adapter, name, None)
        if not isinstance(view, Geometry):
            raise PluginError(f"{name} must be a Geometry, not {type(view).__name__}")
    return adapter.teacher_view, adapter.student_view


def layer_matrix(
    mapper: LayerMapper, *, teacher: Geometry, student: Geometry
) -> Float[Tensor, "{student.layer} {teacher.layer}"]:
    """Return a layer mapper's weights: row i mixes student layer i from the teacher's layers.

    Raises:
        PluginError: it returns something else than real numbers of this shape.
    """
    matrix = require_shape(call_component(mapper), (student.layer, teacher.layer), "layer t_layer")
    require_floats(matrix)
    return matrix


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

    Raises:
        PluginError: something else comes out.
    """
    batch, _, _, time, _ = x.shape
    adapted = require_like(call_component(adapter, x, part), x, (batch, layer, head, time, dim), AXES)
    require_attached(adapted, x)
    return adapted


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

    Raises:
        PluginError: something else comes out.
    """
    batch, _, _, time, _ = x.shape
    folded = call_component(adapter, x, method="fold")
    folded = require_like(folded, x, (batch, layer, head, time, dim), AXES)
    require_attached(folded, x)
    return folded


def plan_time(warper: TimeWarper, teacher: Timeline, student: Timeline) -> TimeMap:
    """Plan the time map of a batch; its validity has the student's extents ``batch time``.

    Raises:
        PluginError: the warper returns something else than a ``TimeMap``, or one that reads beyond its
            example, or whose rows are no means.
        NonFiniteError: a weight is NaN or infinite.
    """
    time_map = call_component(warper, teacher, student)
    return require_time_map(time_map, teacher, student, evicts=isinstance(warper, Evictor))


def warp_time(
    time_map: TimeMap, x: Float[Tensor, "batch layer head t_time dim"], *, time: int
) -> Float[Tensor, "batch layer head {time} dim"]:
    """Apply a time map: ``t_time → time``.

    Raises:
        PluginError: the map does not fit ``x``: it is an identity between unequal lengths.
    """
    warped = time_map.apply(x)
    batch, layer, head, _, dim = x.shape
    return require_like(warped, x, (batch, layer, head, time, dim), AXES)


def project_dim(
    projector: DimProjector, x: Float[Tensor, "batch layer head time t_dim"], part: Part, *, dim: int
) -> Float[Tensor, "batch layer head time {dim}"]:
    """Apply a dim projector: ``t_dim → dim``.

    Raises:
        PluginError: something else comes out.
    """
    projected = require_like(call_component(projector, x, part), x, (*x.shape[:4], dim), AXES)
    require_attached(projected, x)
    return projected


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
        PluginError: the weights have another shape, dtype or device, or some are negative where a teacher is
            valid.
        NonFiniteError: some are NaN or infinite there.
    """
    teacher, batch, time = valid.shape
    weights = require_shape(
        call_component(fuser, context), (teacher, batch, layer, time), "teacher batch layer time"
    )
    require_floats(weights)
    require_device(weights, valid.device)
    weights = weights.masked_fill(~valid[:, :, None], 0)
    require_weights(weights, "teachers")
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
    """Return a loss as one number: its values, weighted and summed over positions and layers.

    Raises:
        PluginError: it is no scalar in float32 or wider, or elsewhere than the caches; in debug mode also if
            the student would get no gradient from it.
        NonFiniteError: it is NaN or infinite, and the caches are not.
    """
    total = require_shape(call_component(loss, student, target, weight), (), "")
    require_floats(total, at_least=torch.float32)
    require_device(total, weight.device)
    require_finite_loss(total, (student, target), weight)
    require_loss_attached(total, student)
    return total


def fuser_penalty(
    fuser: Regularised, weights: Float[Tensor, "teacher batch layer time"]
) -> Float[Tensor, ""]:
    """Return the term that a fuser adds to the loss.

    Raises:
        PluginError: it is no scalar in float32 or wider, or elsewhere than the weights.
        NonFiniteError: it is NaN or infinite.
    """
    penalty = require_shape(call_component(fuser, weights, method="penalty"), (), "")
    require_floats(penalty, at_least=torch.float32)
    require_device(penalty, weights.device)
    raise_if(~torch.isfinite(penalty.detach())[None], lambda _: NonFiniteError("penalty is NaN or infinite"))
    return penalty


def chosen_teachers(fuser: Chooses, teachers: int) -> tuple[bool, ...]:
    """Return for every teacher whether a fuser wants it to run.

    Raises:
        PluginError: it returns something else than a bool for each teacher, or chooses none.
    """
    chosen = require_shape(fuser.choose(), (teachers,), "teacher")
    if chosen.dtype != torch.bool or chosen.is_meta:
        raise PluginError(
            f"choose() returned {chosen.dtype} on {chosen.device}, must be torch.bool with values"
        )
    flags = tuple(chosen.tolist())
    if not any(flags):
        raise PluginError("choose() returned no teacher; at least one must run")
    return flags


def show_component(component: Any, *arguments: Any) -> None:
    """Let a component take in one batch of data, before training.

    Raises:
        PluginError: in debug mode, if it changes the data.
    """
    with unchanged_inputs(arguments):
        component.observe(*arguments)


def finish_component(component: Any) -> None:
    """Let a component compute what it needs from everything that it was shown.

    Raises:
        NonFiniteError: one of its parameters or buffers is NaN or infinite afterwards.
    """
    raise_unread_faults()
    component.finish()
    state = {**dict(component.named_parameters()), **dict(component.named_buffers())}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{name!r} holds NaN or infinity after finish()")
