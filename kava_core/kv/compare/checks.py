"""Check that aligned caches can be compared as a spec asks, before training. All raise SpecError."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kava_core.config import KVLossConfig, Part
from kava_core.errors import SpecError
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.protocols.axes import Geometry
from kava_core.protocols.kv_loss import ObservesCaches


def check_calibration(aligners: Sequence[TeacherAligner], parts: tuple[Part, ...]) -> None:
    """Refuse queries alone if they are projected by what was calibrated on keys."""
    borrows_keys = any(getattr(aligner.dim_projector, "queries_from_keys", False) for aligner in aligners)
    if "queries" in parts and "keys" not in parts and borrows_keys:
        raise SpecError(
            f"losses compare {', '.join(parts)}: a calibrated projector needs keys as well; "
            "add keys to 'parts', or use dim_projector linear"
        )


def check_views(aligners: Sequence[TeacherAligner], *, separate: bool) -> None:
    """Refuse to fuse targets of different extents, and layers that only some teachers merge."""
    views = {(aligner.target, aligner.view) for aligner in aligners}
    targets = "; ".join(f"{aligner.name}: {aligner.target}" for aligner in aligners)
    if not separate and len(views) > 1:
        raise SpecError(
            f"target: fused needs one head adapter view and one width for all teachers, not {targets}; "
            "use the same head_adapter and a dim_projector, or target: separate"
        )
    if len({aligner.view.layer for aligner in aligners}) > 1:
        raise SpecError(f"all teachers must have their layers merged, or none: {targets}")


def check_widths(aligners: Sequence[TeacherAligner], configs: Sequence[KVLossConfig]) -> None:
    """Refuse sides of different heads or width if a loss compares them channel by channel."""
    need_equal_widths = [config.name for config in configs if not config.basis_free]
    for aligner in aligners:
        same = (aligner.target.head, aligner.target.dim) == (aligner.view.head, aligner.view.dim)
        if not same and need_equal_widths:
            raise SpecError(
                f"teacher {aligner.name!r}: aligned to {aligner.target} but the student has "
                f"{aligner.view}; loss {need_equal_widths[0]!r} compares equal widths: use dim_projector "
                "calibrated, linear or elastic"
            )


def check_rotation(aligners: Sequence[TeacherAligner], student: Geometry) -> None:
    """Refuse ``rotary: match`` for a target without the student's heads: it has nothing to be rotated like.

    Args:
        aligners: of all teachers.
        student: the student's geometry, with the compared layers as ``layer``.
    """
    for aligner in aligners:
        own = student.with_(qhead=aligner.target.qhead).attending_like(aligner.target)
        if aligner.target != own:
            raise SpecError(
                f"rotary: match: teacher {aligner.name!r} is compared at {aligner.target}, not the "
                f"student's {own}; use head_adapter structured, direction: to_student and a projector, "
                "or rotary: strip"
            )


def check_observing(losses: Sequence[nn.Module], configs: Sequence[KVLossConfig]) -> None:
    """Refuse ``rotary: match`` for a loss that learns from unrotated keys what rotated ones would not show.

    Args:
        losses: of one teacher.
        configs: their declarations.
    """
    for loss, config in zip(losses, configs, strict=True):
        if isinstance(loss, ObservesCaches) and set(config.parts) != {"values"}:
            raise SpecError(
                f"loss {config.name!r} looks at unrotated caches before training: with rotary: match "
                "it can compare values alone; use rotary: strip"
            )
