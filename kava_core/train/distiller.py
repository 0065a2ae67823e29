"""Student, aligners, fuser and losses in one module with one forward pass. Teachers stay outside.

Everything that has gradients runs inside the one wrapped forward, so that DDP, FSDP and resuming see all
of it; teachers are held where ``nn.Module`` does not look, so that nothing trains, saves or wraps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.kv.aligner import TeacherAligner
from kava_core.kv.axes import Cache
from kava_core.kv.capture import Capture
from kava_core.kv.masks import without_autocast
from kava_core.kv.pipeline import Aligned, Beside, KVPipeline
from kava_core.kv.timeline import Timeline
from kava_core.kv.timemap import TimeMap
from kava_core.protocols import Rewarded
from kava_core.store.reader import target_of
from kava_core.train.teacher import Teacher

IGNORED = -100
"""Label of positions without cross-entropy, as in transformers."""


def cross_entropy(
    logits: Float[Tensor, "batch time vocab"], labels: Int[Tensor, "batch time"], items: Tensor
) -> Float[Tensor, ""]:
    """Summed next-token cross-entropy of the labelled positions, divided by ``items``, in float32."""
    return (
        F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        / items
    )


class Distiller(nn.Module):
    """What the trainer trains.

    Args:
        student: a causal language model of transformers, possibly with adapters.
        pipeline: alignment, fusion and KV losses; None trains on cross-entropy alone.
        teachers: one for each aligner of the pipeline; none where batches bring stored targets.
        parts: what the losses compare.
        rotary: whether keys and queries are compared without their rotation.
    """

    main_input_name = "student"
    supports_gradient_checkpointing = True

    def __init__(
        self,
        student: nn.Module,
        pipeline: KVPipeline | None = None,
        teachers: Sequence[Teacher] = (),
        *,
        parts: tuple[Part, ...] = ("keys", "values"),
        rotary: Literal["strip", "keep", "match"] = "strip",
    ) -> None:
        super().__init__()
        self.student = student
        self.config = student.config
        self.pipeline = pipeline
        self.__dict__["teachers"] = tuple(teachers)
        self.parts, self.rotary = parts, rotary
        self.__dict__["capture"] = None if pipeline is None else self._capture(rotary)

    def _capture(self, rotary: Literal["strip", "keep", "match"]) -> Capture:
        assert self.pipeline is not None
        return Capture(self.student, layers=self.pipeline.layers, parts=self.parts, rotary=rotary)

    def forward(
        self, student: Mapping[str, Any], teachers: Mapping[str, Mapping[str, Any]], items: Tensor
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            student: the collator's tensors of the student's side.
            teachers: the same for every teacher, by name; with ``time_map`` where it is planned already; or
                its side of a store.
            items: Float ``2``: labelled positions and real tokens of the whole batch.

        Returns:
            ``loss`` (cross-entropy + Σ λ · term), and detached ``ce`` and every KV term.
        """
        if self.pipeline is None:
            ce = cross_entropy(self._outputs(student).logits, student["labels"], items[0])
            return {"loss": ce, "ce": ce.detach()}
        ce, terms = self.terms(student, teachers, items)
        with without_autocast(ce.device):
            loss = ce + self.pipeline.total(terms)
        self._reward(ce.detach() * items[0], student["labels"])
        return {"loss": loss, "ce": ce.detach(), **{name: term.detach() for name, term in terms.items()}}

    def terms(
        self, student: Mapping[str, Any], teachers: Mapping[str, Mapping[str, Any]], items: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and every unweighted KV term, with gradient; arguments as in ``forward``."""
        assert self.pipeline is not None
        timeline = Timeline.from_batch(student)
        aligned = self.aligned(teachers, timeline, self.pipeline, self.pipeline.choose())
        capture: Capture = self.__dict__["capture"]
        with capture:
            outputs = self._outputs(student)
        ce = cross_entropy(outputs.logits, student["labels"], items[0])
        with without_autocast(ce.device):
            cache = capture.take()
            rotation = capture.rotation() if self.rotary == "match" else None
            beside = Beside(self._hidden(outputs), student.get("tasks"))
            return ce, self.pipeline.terms_of(cache, aligned, timeline, items[1], rotation, beside)

    def aligned(
        self,
        teachers: Mapping[str, Mapping[str, Any]],
        timeline: Timeline,
        pipeline: KVPipeline,
        chosen: tuple[bool, ...] | None = None,
    ) -> list[Aligned]:
        """Every teacher's target, from a store or by this pipeline; one raw cache is alive at a time.

        Teachers that are not ``chosen`` do not run.
        """
        wanted = chosen or (True,) * len(pipeline.teachers)
        return [
            self._target(aligner, teachers[aligner.name], timeline, pipeline)
            if runs
            else pipeline.absent(aligner, timeline.mask)
            for aligner, runs in zip(pipeline.teachers, wanted, strict=True)
        ]

    def _hidden(self, outputs: Any) -> Tensor | None:
        return outputs.hidden_states[-1].detach() if self._wants_hidden else None

    @property
    def _wants_hidden(self) -> bool:
        return self.pipeline is not None and getattr(self.pipeline.fuser, "needs_hidden", False)

    def _reward(self, total: Tensor, labels: Tensor) -> None:
        """Tell a fuser that learns from it the mean cross-entropy of this forward pass, in training."""
        if self.training and self.pipeline is not None and isinstance(self.pipeline.fuser, Rewarded):
            self.pipeline.fuser.reward(total / labels[:, 1:].ne(IGNORED).sum().clamp_min(1))

    def _target(
        self, aligner: TeacherAligner, side: Mapping[str, Any], timeline: Timeline, pipeline: KVPipeline
    ) -> Aligned:
        if "target" in side:
            return Aligned(*target_of(side))
        cache = self._teacher(aligner.name).cache(side)
        with without_autocast(timeline.mask.device):
            return pipeline.warped(aligner, cache, _time_map(aligner, side, timeline))

    def _teacher(self, name: str) -> Teacher:
        found: Teacher = next(teacher for teacher in self.__dict__["teachers"] if teacher.name == name)
        return found

    def _outputs(self, side: Mapping[str, Tensor]) -> Any:
        return self.student(
            input_ids=side["input_ids"],
            attention_mask=side["attention_mask"],
            use_cache=False,
            **({"output_hidden_states": True} if self._wants_hidden else {}),
        )

    def place_teachers(self, device: torch.device) -> None:
        """Move the teachers to the device of the batches."""
        for teacher in self.__dict__["teachers"]:
            teacher.to(device)

    @torch.no_grad()
    def calibrate(self, batch: Mapping[str, Any]) -> None:
        """Show one batch of everyone's cache to every projector that wants to see data."""
        assert self.pipeline is not None
        timeline = Timeline.from_batch(batch["student"])
        student = self.still_cache(batch["student"])
        for aligner, teacher in zip(self.pipeline.teachers, self.__dict__["teachers"], strict=True):
            if aligner.wants_calibration:
                side = batch["teachers"][teacher.name]
                cache = teacher.cache(side).map(_wide)
                aligner.observe(cache, student, _time_map(aligner, side, timeline))

    @torch.no_grad()
    def show_fuser(self, batch: Mapping[str, Any]) -> None:
        """Show one batch of aligned targets to a fuser that wants to see data."""
        assert self.pipeline is not None
        student, timeline = self.still_cache(batch["student"]), Timeline.from_batch(batch["student"])
        aligned = self.aligned(batch["teachers"], timeline, self.pipeline)
        view = self.pipeline.teachers[0].view_of(student)
        self.pipeline.fuser.observe(self.pipeline.context(view, aligned, Beside()))

    @torch.no_grad()
    def still_cache(self, side: Mapping[str, Tensor]) -> Cache:
        """The student's cache in evaluation mode, in float32; unrotated with ``rotary: match``."""
        here, training = next(self.student.parameters()).device, self.training
        capture = self._capture("keep" if self.rotary == "keep" else "strip")
        self.student.eval()
        with capture:
            self.student.base_model(
                input_ids=side["input_ids"].to(here),
                attention_mask=side["attention_mask"].to(here),
                use_cache=False,
            )
        self.student.train(training)
        return capture.take().map(lambda x, part: _wide(x, part).to(side["input_ids"].device))

    def finish_calibration(self) -> None:
        """Compute every calibrated projection from what was observed."""
        assert self.pipeline is not None
        for aligner in self.pipeline.teachers:
            if aligner.wants_calibration:
                aligner.dim_projector.finish()


def _time_map(aligner: TeacherAligner, side: Mapping[str, Any], timeline: Timeline) -> TimeMap:
    """The map the collator planned, or a new one."""
    planned: TimeMap | None = side.get("time_map")
    return aligner.plan(Timeline.from_batch(side), timeline) if planned is None else planned


def _wide(x: Tensor, _: Part) -> Tensor:
    return x.float()
