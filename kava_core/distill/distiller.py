"""Student, aligners, fuser and losses in one module with one forward pass. Teachers stay outside.

Everything that has gradients runs inside the one wrapped forward, so that DDP, FSDP and resuming see all
of it; teachers are held where ``nn.Module`` does not look, so that nothing trains, saves or wraps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig

from kava_core.config import Part
from kava_core.data.encode import NO_LABEL
from kava_core.data.store.reader import decode_target
from kava_core.distill.denominators import LABELLED, READ, TOKENS, loss_denominators
from kava_core.distill.hidden_states import CODI, READING, STEPS, codi_term, step_cross_entropy
from kava_core.distill.logits import logit_divergence, same_tokens
from kava_core.distill.student_pass import LatentSetup, StudentPass, cross_entropy
from kava_core.distill.teachers import time_map_of
from kava_core.errors import SpecError
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.finite import part_at_least_float32
from kava_core.kv.align.streaming import align_layer_by_layer
from kava_core.kv.capture.capture import Capture
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.kv.compare.streaming import (
    TeacherStream,
    assert_can_stream,
    streams_terms,
    terms_layer_by_layer,
)
from kava_core.kv.compare.values import ROUTER, Aligned, FuserInputs
from kava_core.kv.maths.masks import without_autocast
from kava_core.latent.curriculum import side_at_stage
from kava_core.latent.growing_text import decoder_of
from kava_core.latent.student import (
    answer_logits,
    final_pass,
    latent_columns,
    logits_kept,
    refine_latents,
    states_at_answer_boundary,
    writer_logits,
)
from kava_core.models.ledger import STUDENT, Ledger
from kava_core.models.own_teacher import OwnTeacher
from kava_core.models.placement import REPLICATED, SHARDED
from kava_core.models.side_stream import SideStream, on_other_gpu
from kava_core.models.teacher import Teacher
from kava_core.processes import processes_met
from kava_core.protocols.axes import Cache
from kava_core.protocols.fuser import Chooses, Rewarded
from kava_core.protocols.timeline import Timeline
from kava_core.specfile.sections.losses import LogitsSpec

LOGITS = "logits"
"""Name of the term of next-token distributions."""


class Distiller(nn.Module):
    """What the trainer trains.

    Args:
        student: a causal language model of transformers, possibly with adapters.
        pipeline: alignment, fusion and KV losses; None trains without any.
        teachers: one for each aligner of the pipeline; none where batches bring stored targets.
        parts: what the losses compare.
        rotary: whether keys and queries are compared without their rotation.
        stream: align a teacher's layers, or form the KV terms, while it runs, one layer alive at a time.
        logits: the term of next-token distributions; teachers whose ``logits`` are kept take part.
        latent: latent tokens in place of written steps; the student's side is then ``LatentCollator``'s.

    Raises:
        SpecError: this pipeline's terms cannot be had layer by layer.
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
        stream: bool = False,
        logits: LogitsSpec | None = None,
        latent: LatentSetup | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.config = student.config
        self.pipeline = pipeline
        self.latents = None if latent is None else latent.tokens
        self.latent = latent
        self.__dict__["teachers"] = tuple(teachers)
        self.__dict__["aside"] = SideStream(torch.device("cpu"))
        self.parts, self.rotary, self.stream, self.logits = parts, rotary, stream, logits
        self.dropout_seed: int | None = None
        if stream and pipeline is not None:
            assert_can_stream(pipeline)
        self.__dict__["capture"] = None if pipeline is None else self._capture(rotary)

    @property
    def _by_terms(self) -> bool:
        return self.stream and self.pipeline is not None and streams_terms(self.pipeline)

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
            items: ``loss_denominators`` of the whole batch.

        Returns:
            ``loss`` (cross-entropy + Σ λ · term), and detached ``ce`` and every term.
        """
        student = self.staged(student)
        with self._listening():
            own, total, terms = self._distilled(student, teachers, items)
        more = self._more_terms(own, student, teachers, items)
        total = total + sum(weight * term for weight, term in more.values())
        terms |= {name: term for name, (_, term) in more.items()}
        self._reward(own.ce.detach() * items[LABELLED], student["labels"])
        return {"loss": own.ce + total, "ce": own.ce.detach(), **{n: t.detach() for n, t in terms.items()}}

    def watched(self, ledger: Ledger) -> None:
        """Let a ledger count what teachers, and a student of latent tokens, read."""
        for teacher in self.__dict__["teachers"]:
            teacher.ledger = ledger
        if self.latents is not None:
            ledger.watch(self.student, decoder_of(self.student))

    def configs(self) -> dict[str, PreTrainedConfig]:
        """Of the student and of every other model that runs, by name."""
        apart = (t for t in self.__dict__["teachers"] if not isinstance(t, OwnTeacher))
        return {STUDENT: self.student.config, **{t.name: t.model.config for t in apart}}

    def note(self, ledger: Ledger, student: Mapping[str, Tensor]) -> None:
        """Enter the student's side of a batch into the ledger."""
        mask = self.staged(student)["attention_mask"]
        ledger.add_tokens(STUDENT, mask)
        if self.latents is None:
            ledger.add_text(STUDENT, mask, ledger.backward, head=True)

    def counts(self, batch: Mapping[str, Any]) -> Float[Tensor, "4"]:
        """What a batch of the collator's adds to the counts that its terms are divided by."""
        own = None if self.own_teacher is None else self.own_teacher.name
        return loss_denominators(self.staged(batch["student"]), batch["teachers"], own)

    def staged(self, student: Mapping[str, Any]) -> Mapping[str, Any]:
        """The student's side at the present stage of a curriculum, if there is one."""
        if self.latent is None:
            return student
        return side_at_stage(student, self.latent.spec, self.latent.tokens.active)

    def _more_terms(
        self,
        own: StudentPass,
        student: Mapping[str, Any],
        teachers: Mapping[str, Mapping[str, Any]],
        items: Tensor,
    ) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of every term that does not compare caches."""
        found: dict[str, tuple[float, Tensor]] = {}
        if self.logits is not None:
            term = self._logit_term(own.logits, student, teachers, items[LABELLED])
            found[LOGITS] = (self.logits.weight, term)
        if self.latent is None:
            return found
        if own.boundary_states is not None and self.latent.codi is not None:
            found[CODI] = (self.latent.codi.weight, self._codi_term(own.boundary_states, teachers, items))
        if self.latent.spec.step_cross_entropy and own.writers is not None:
            term = step_cross_entropy(own.writers, student["trace"], items)
            found[STEPS] = (self.latent.spec.step_cross_entropy, term)
        if self.own_teacher is not None and (logits := self.own_teacher.take_logits()) is not None:
            term = cross_entropy(logits, teachers[self.own_teacher.name]["labels"], items[READ])
            found[READING] = (self.latent.reading, term)
        return found

    @property
    def own_teacher(self) -> OwnTeacher | None:
        """The teacher that is the student itself."""
        own = (teacher for teacher in self.__dict__["teachers"] if isinstance(teacher, OwnTeacher))
        return next(own, None)

    def _codi_term(
        self, boundary_states: Tensor, teachers: Mapping[str, Mapping[str, Any]], items: Tensor
    ) -> Tensor:
        """Its teacher always runs: others are refused."""
        teacher = next(teacher for teacher in self.__dict__["teachers"] if teacher.hidden)
        hidden = teacher.take_hidden()
        assert hidden is not None
        theirs = states_at_answer_boundary(
            hidden, teachers[teacher.name]["answer_boundary"].to(hidden[0].device)
        )
        return codi_term(boundary_states, theirs.to(boundary_states.device), items)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Teachers keep the logits of this forward pass, and of no other."""
        for teacher in self.__dict__["teachers"]:
            teacher.take_logits()
            teacher.take_hidden()
            teacher.listening = True
        try:
            yield
        finally:
            for teacher in self.__dict__["teachers"]:
                teacher.listening = False

    def _distilled(
        self, student: Mapping[str, Any], teachers: Mapping[str, Mapping[str, Any]], items: Tensor
    ) -> tuple[StudentPass, Tensor, dict[str, Tensor]]:
        """The student's pass, Σ λ · KV term, and the KV terms."""
        if self.pipeline is None:
            for teacher in self.__dict__["teachers"]:
                teacher.read(teachers[teacher.name])
            own = self._pass(student, items)
            return own, torch.zeros_like(own.ce), {}
        if self._by_terms:
            factors = self.pipeline.present_weights()[None]
            own, sums, terms, more = self._streamed(student, teachers, items, factors)
            return own, sums[0] + more.get(ROUTER, 0), terms | more
        own, terms = self._compared(student, teachers, items)
        with without_autocast(own.ce.device):
            return own, self.pipeline.total(terms) + self.pipeline.idle(), terms

    def terms(
        self, student: Mapping[str, Any], teachers: Mapping[str, Mapping[str, Any]], items: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and every unweighted KV term, with gradient; arguments as in ``forward``."""
        assert self.pipeline is not None
        if not self._by_terms:
            own, terms = self._compared(student, teachers, items)
            return own.ce, terms
        apart = torch.eye(len(self.pipeline.terms), device=items.device)
        own, sums, _, more = self._streamed(student, teachers, items, apart)
        return own.ce, dict(zip(self.pipeline.terms, sums.unbind(), strict=True)) | more

    def _compared(
        self, student: Mapping[str, Any], teachers: Mapping[str, Mapping[str, Any]], items: Tensor
    ) -> tuple[StudentPass, dict[str, Tensor]]:
        """With every teacher's aligned cache at once."""
        assert self.pipeline is not None
        timeline = Timeline.from_batch(student)
        aside: SideStream = self.__dict__["aside"]
        chosen = self.pipeline.choose()
        with aside():
            aligned = self.aligned(teachers, timeline, self.pipeline, chosen)
        own = self._pass(student, items)
        aside.join(*(x for one in aligned for _, x in one.target.items()))
        with without_autocast(own.ce.device):
            beside = (own.rotation, own.beside)
            terms = self.pipeline.terms_of(own.cache, aligned, timeline, items[TOKENS], *beside)
            return own, terms

    def _streamed(
        self,
        student: Mapping[str, Any],
        teachers: Mapping[str, Mapping[str, Any]],
        items: Tensor,
        factors: Tensor,
    ) -> tuple[StudentPass, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Layer by layer: sums of KV terms with gradient, the terms without, and what the fuser adds."""
        pipeline = self.pipeline
        assert pipeline is not None
        timeline, chosen = Timeline.from_batch(student), pipeline.choose()
        own = self._pass(student, items)
        maps = [time_map_of(a, teachers[a.name], timeline) for a in pipeline.teachers]
        nowhere = torch.zeros_like(timeline.mask)
        there = [
            Aligned(Cache(), one.valid if runs else nowhere, runs)
            for one, runs in zip(maps, chosen, strict=True)
        ]
        with without_autocast(own.ce.device):
            view = pipeline.teachers[0].view_of(own.cache.map(part_at_least_float32))
            weights, more = pipeline.routed(view, there, items[TOKENS], own.beside)
        streams = [
            TeacherStream(place, partial(self._teacher(a.name).stream, teachers[a.name]), maps[place])
            for place, a in enumerate(pipeline.teachers)
            if chosen[place]
        ]
        sums, terms = terms_layer_by_layer(pipeline, own.cache, weights, streams, factors, own.rotation)
        return own, sums, terms, more

    def _pass(self, student: Mapping[str, Any], items: Tensor) -> StudentPass:
        """The student's forward pass; its cache is captured where there are KV losses."""
        capture: Capture | None = self.__dict__["capture"]
        with self._own_dropout(items.device):
            outputs = self._outputs(student, nullcontext() if capture is None else capture)
        logits = outputs.logits if self.latents is None else answer_logits(outputs.logits, student)
        ce = cross_entropy(logits, student["labels"], items[LABELLED])
        latent = self._latent_part(outputs, student)
        if capture is None:
            return StudentPass(logits, ce, Cache(), None, FuserInputs(), **latent)
        with without_autocast(ce.device):
            cache = self._compared_part(capture.take(), student)
        rotation = capture.rotation() if self.rotary == "match" else None
        beside = FuserInputs(self._hidden(outputs, student), student.get("tasks"))
        return StudentPass(logits, ce, cache, rotation, beside, **latent)

    @contextmanager
    def _own_dropout(self, device: torch.device) -> Iterator[None]:
        """Random numbers that do not depend on how many the teachers' side has drawn."""
        if self.dropout_seed is None or not self.training:
            yield
            return
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.dropout_seed)
            yield

    def _latent_part(self, outputs: Any, side: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What CODI's and LOTUS's terms look at."""
        if self.latent is None:
            return {}
        found = {}
        if self.latent.codi is not None:
            first = outputs.hidden_states[0].shape[1] - side["after"].shape[1]
            found["boundary_states"] = states_at_answer_boundary(
                outputs.hidden_states, side["answer_boundary"] + first
            )
        if self.latent.spec.step_cross_entropy:
            found["writers"] = writer_logits(outputs.logits, side)
        return found

    def _compared_part(self, cache: Cache, side: Mapping[str, Tensor]) -> Cache:
        """All positions, or the latent tokens'."""
        if self.latents is None:
            return cache
        columns = latent_columns(side)
        return cache.map(lambda x, _: x[:, :, :, columns])

    def _logit_term(
        self,
        logits: Tensor,
        student: Mapping[str, Any],
        teachers: Mapping[str, Mapping[str, Any]],
        labelled: Tensor,
    ) -> Tensor:
        """Mean divergence over labelled tokens and over the teachers that ran with their logits kept."""
        assert self.logits is not None
        heard = [(t.name, found) for t in self.__dict__["teachers"] if (found := t.take_logits()) is not None]
        terms = [torch.zeros_like(labelled)]
        for name, found in heard:
            places, counts = same_tokens(student, teachers[name])
            weight = counts / (labelled * len(heard))
            how: dict[str, Any] = {"temperature": self.logits.temperature, "kind": self.logits.kind}
            terms.append(logit_divergence(logits, found.to(logits.device), places, weight, **how))
        return torch.stack(terms).sum()

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

    def _hidden(self, outputs: Any, side: Mapping[str, Tensor]) -> Tensor | None:
        if not self._wants_hidden:
            return None
        hidden: Tensor = outputs.hidden_states[-1].detach()
        return hidden if self.latents is None else hidden[:, latent_columns(side)]

    @property
    def _wants_hidden(self) -> bool:
        return self.pipeline is not None and getattr(self.pipeline.fuser, "needs_hidden", False)

    def _reward(self, total: Tensor, labels: Tensor) -> None:
        """Tell a fuser that learns from it the mean cross-entropy of this forward pass, in training."""
        if self.training and self.pipeline is not None and isinstance(self.pipeline.fuser, Rewarded):
            self.pipeline.fuser.reward(total / labels[:, 1:].ne(NO_LABEL).sum().clamp_min(1))

    def _target(
        self, aligner: TeacherAligner, side: Mapping[str, Any], timeline: Timeline, pipeline: KVPipeline
    ) -> Aligned:
        if "target" in side:
            return Aligned(*decode_target(side))
        teacher, time_map = self._teacher(aligner.name), time_map_of(aligner, side, timeline)
        if self.stream and not (streams_terms(pipeline) and torch.is_grad_enabled()):
            return Aligned(
                align_layer_by_layer(aligner, partial(teacher.stream, side), time_map), time_map.valid
            )
        cache = teacher.cache(side)
        with without_autocast(timeline.mask.device):
            return pipeline.warped(aligner, cache, time_map)

    def _teacher(self, name: str) -> Teacher:
        found: Teacher = next(teacher for teacher in self.__dict__["teachers"] if teacher.name == name)
        return found

    def _outputs(self, side: Mapping[str, Tensor], captured: AbstractContextManager[Any]) -> Any:
        """Of the pass that predicts tokens, which runs inside ``captured``."""
        wanted = self._wants_hidden or (self.latent is not None and self.latent.codi is not None)
        options = {"output_hidden_states": True} if wanted else {}
        if self.latents is None:
            text = {name: side[name] for name in ("input_ids", "attention_mask")}
            with captured:
                return self.student(**text, use_cache=False, **options)
        assert self.latent is not None
        kept = logits_kept(self.student, side, writers=self.latent.spec.step_cross_entropy > 0)
        thought = refine_latents(self.student, self.latents, side["before"], side["before_mask"])
        with captured:
            return final_pass(self.student, thought, side, **options, **kept)

    def place_teachers(self, device: torch.device, placements: Mapping[str, str] | None = None) -> None:
        """Bring the teachers to where the spec places them, by name: by default the device of the batches."""
        for teacher in self.__dict__["teachers"]:
            teacher.to(device, (placements or {}).get(teacher.name, REPLICATED))
        self._check_choice(placements or {})
        if any(on_other_gpu(placement, device) for placement in (placements or {}).values()):
            self.__dict__["aside"] = SideStream(device)

    def _check_choice(self, placements: Mapping[str, str]) -> None:
        """SpecError where processes would wait for each other at a sharded teacher that only some drew."""
        divided = [name for name, placement in placements.items() if placement == SHARDED]
        fuser = self.pipeline.fuser if self.pipeline is not None else None
        if divided and isinstance(fuser, Chooses) and getattr(fuser, "draws", True) and processes_met() > 1:
            raise SpecError(
                f"teacher {divided[0]!r}: placement: sharded: the fuser draws teachers, each process by "
                "itself; place it replicated, or choose another fuser"
            )

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
                aligner.observe(cache, student, time_map_of(aligner, side, timeline))

    @torch.no_grad()
    def show_fuser(self, batch: Mapping[str, Any]) -> None:
        """Show one batch of aligned targets to a fuser that wants to see data."""
        assert self.pipeline is not None
        student, timeline = self.still_cache(batch["student"]), Timeline.from_batch(batch["student"])
        aligned = self.aligned(batch["teachers"], timeline, self.pipeline)
        view = self.pipeline.teachers[0].view_of(student)
        self.pipeline.fuser.observe(self.pipeline.context(view, aligned, FuserInputs()))

    @torch.no_grad()
    def show_losses(self, batch: Mapping[str, Any]) -> None:
        """Show one batch to the losses that want to see data."""
        assert self.pipeline is not None
        student, timeline = self.still_cache(batch["student"]), Timeline.from_batch(batch["student"])
        self.pipeline.show_losses(student, self.aligned(batch["teachers"], timeline, self.pipeline))

    @torch.no_grad()
    def still_cache(self, side: Mapping[str, Tensor]) -> Cache:
        """The student's cache in evaluation mode, in float32; unrotated with ``rotary: match``."""
        here, training = next(self.student.parameters()).device, self.training
        capture = self._capture("keep" if self.rotary == "keep" else "strip")
        home, side = side["segments"].device, {k: x.to(here) for k, x in side.items() if k != "tasks"}
        self.student.eval()
        if self.latents is None:
            text = {name: side[name] for name in ("input_ids", "attention_mask")}
            with capture:
                self.student.base_model(**text, use_cache=False)
        else:
            self._outputs(side, capture)
        self.student.train(training)
        return self._compared_part(capture.take(), side).map(lambda x, part: _wide(x, part).to(home))

    def finish_calibration(self) -> None:
        """Compute every calibrated projection from what was observed."""
        assert self.pipeline is not None
        for aligner in self.pipeline.teachers:
            if aligner.wants_calibration:
                aligner.dim_projector.finish()


def _wide(x: Tensor, _: Part) -> Tensor:
    return x.float()
