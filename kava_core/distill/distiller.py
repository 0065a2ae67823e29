"""Hold student, aligners, fuser and losses in one module with one forward pass. Teachers stay outside.

Everything that has gradients runs inside the one wrapped forward, so that DDP, FSDP and resuming see all
of it. Teachers are plain objects, which ``nn.Module`` does not register: nothing trains, saves or wraps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig

from kava_core.config import Part, WeightedTerm
from kava_core.data.encoding.encode import NO_LABEL
from kava_core.distill.aligned_states import HIDDEN, AlignedStates
from kava_core.distill.alignment import Step, StepBatch, choose_alignment
from kava_core.distill.cross_tokenizer.cross_logits import CROSS_LOGITS, CrossLogits
from kava_core.distill.denominators import LABELLED, READ, loss_denominators
from kava_core.distill.hidden_states import CODI, READING, STEPS, codi_term, step_cross_entropy
from kava_core.distill.logits import LOGITS, logit_term
from kava_core.distill.student_pass import (
    AUX_LOSS,
    LatentSetup,
    StudentPass,
    aux_loss,
    aux_loss_weight,
    cross_entropy,
)
from kava_core.distill.term_weights import TermWeights
from kava_core.distill.terms import Term, metrics_of_step, total_loss
from kava_core.errors import SpecError
from kava_core.kv.capture.capture import Capture
from kava_core.kv.compare.no_distillation import NoDistillation
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.kv.compare.streaming import assert_can_stream
from kava_core.kv.compare.values import FuserInputs
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
from kava_core.models.teacher import Teacher, TeacherPass
from kava_core.processes import processes_met
from kava_core.protocols.axes import Cache
from kava_core.protocols.fuser import Chooses, Rewarded
from kava_core.specfile.sections.losses import LogitsSpec


class Distiller(nn.Module):
    """What the trainer trains.

    Args:
        student: a causal language model of transformers, possibly with adapters.
        pipeline: alignment, fusion and KV losses; None: no cache is distilled.
        teachers: one for each aligner of the pipeline; none if batches bring stored targets.
        parts: what the losses compare.
        rotary: whether keys and queries are compared without their rotation.
        stream: align a teacher's layers, or form the KV terms, while it runs, one layer alive at a time.
        logits: the term of next-token distributions; teachers whose ``logits`` are kept take part.
        cross_logits: the term of next-token distributions across tokenizers.
        hidden: the term of hidden states, with what aligns them.
        latent: latent tokens in place of written steps; the student's side is then ``LatentCollator``'s.

    Raises:
        SpecError: this pipeline's terms cannot be computed layer by layer.
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
        cross_logits: CrossLogits | None = None,
        hidden: AlignedStates | None = None,
        latent: LatentSetup | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.config = student.config
        self.pipeline = NoDistillation() if pipeline is None else pipeline
        self.latents = None if latent is None else latent.tokens
        self.latent = latent
        self.teachers = tuple(teachers)
        self.parts, self.rotary, self.logits = parts, rotary, logits
        self.cross_logits, self.hidden = cross_logits, hidden
        self.term_weights = TermWeights(_weighted_terms(logits, cross_logits, hidden, latent))
        self.dropout_seed: int | None = None
        self.capture = self.capture_student(rotary) if self.pipeline.compared else None
        self._side_stream = SideStream(torch.device("cpu"))
        self.choose_alignment(stream=stream)

    def choose_alignment(self, *, stream: bool) -> None:
        """Decide how caches are compared from now on.

        Args:
            stream: layer by layer while the teachers run.

        Raises:
            SpecError: they cannot be compared layer by layer.
        """
        if stream and self.pipeline.compared:
            assert_can_stream(self.pipeline)
        self._streams = stream
        self.alignment = choose_alignment(
            self.pipeline, self.teachers, stream=stream, side_stream=self._side_stream
        )

    def capture_student(self, rotary: Literal["strip", "keep", "match"]) -> Capture:
        """Return a capture of the student's compared layers."""
        return Capture(self.student, layers=self.pipeline.layers, parts=self.parts, rotary=rotary)

    # a step

    def forward(
        self, student: Mapping[str, Any], teachers: Mapping[str, Mapping[str, Any]], items: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of a batch.

        Args:
            student: the collator's tensors of the student's side.
            teachers: the same for every teacher, by name; with ``time_map`` if it is planned already; or
                its side of a store.
            items: ``loss_denominators`` of the whole batch.

        Returns:
            ``loss`` (cross-entropy + Σ weight · term), and detached ``ce`` and every term.
        """
        batch = StepBatch(self.at_curriculum_stage(student), teachers, items)
        step = self.alignment.compare(batch, self.student_pass)
        others = self.other_terms(step, batch)
        self._reward_fuser(step.student.cross_entropy, batch)
        loss = total_loss(step.student.cross_entropy, step.kv_terms, others)
        return metrics_of_step(loss, step.student.cross_entropy, step.kv_terms, others)

    def terms(
        self, student: Mapping[str, Any], teachers: Mapping[str, Mapping[str, Any]], items: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return cross-entropy and every unweighted term, with gradient; arguments as for ``forward``."""
        batch = StepBatch(student, teachers, items)
        step = self.alignment.compare_apart(batch, self.student_pass, keep_outputs=True)
        others = {term.name: term.value for term in self.other_terms(step, batch)}
        return step.student.cross_entropy, step.kv_terms.values | others

    @property
    def beside_student(self) -> nn.ModuleList:
        """Return what is trained, saved and calibrated beside the student: all that aligns and routes."""
        return nn.ModuleList([self.pipeline, *([] if self.hidden is None else [self.hidden])])

    # weights of terms

    def weighted_terms(self) -> dict[str, WeightedTerm]:
        """Return the declaration of every term that has one, by the term's name."""
        kv_losses = dict(zip(self.pipeline.term_names, self.pipeline.configs, strict=True))
        return kv_losses | self.term_weights.declared

    def current_weights(self) -> dict[str, Tensor]:
        """Return λ of every one of these terms at this point of the run."""
        of_kv_losses = self.pipeline.current_weights().unbind()
        return dict(zip(self.pipeline.term_names, of_kv_losses, strict=True)) | self.term_weights.current()

    def set_first_weight(self, name: str, weight: Tensor) -> None:
        """Set λ of a term at the first step; its schedule goes on from there."""
        names_of_others = list(self.term_weights.declared)
        if name in names_of_others:
            self.term_weights.weights[names_of_others.index(name)] = weight
        else:
            self.pipeline.weights[self.pipeline.term_names.index(name)] = weight

    def set_progress(self, progress: float) -> None:
        """Say how far the run is, from 0 to 1; schedules of weights go by it."""
        self.pipeline.progress = self.term_weights.progress = progress

    def at_curriculum_stage(self, student: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the student's side at the present stage of a curriculum; the same if there is none."""
        if self.latent is None:
            return student
        return side_at_stage(student, self.latent.spec, self.latent.tokens.active)

    # the student

    def student_pass(self, batch: StepBatch) -> StudentPass:
        """Run the student; its cache is captured if caches are compared."""
        side = batch.student
        capture = nullcontext() if self.capture is None else self.capture
        with self._dropout_of_its_own(batch.denominators.device):
            outputs = self.run_student(side, capture)
        logits = outputs.logits if self.latents is None else answer_logits(outputs.logits, side)
        ce = cross_entropy(logits, side["labels"], batch.denominators[LABELLED])
        boundary = self._answer_boundary(outputs, side)
        latent_logits = self._latent_writer_logits(outputs, side)
        router = aux_loss(outputs, side["labels"], batch.denominators[LABELLED])
        states = None if self.hidden is None else self.hidden.student_states(outputs.hidden_states)
        if self.capture is None:
            return StudentPass(
                logits,
                ce,
                answer_boundary=boundary,
                hidden_states=states,
                latent_writer_logits=latent_logits,
                aux_loss=router,
            )
        with without_autocast(ce.device):
            cache = self.compared_positions(self.capture.take(), side)
        return StudentPass(
            logits,
            ce,
            cache,
            self.capture.rotation() if self.rotary == "match" else None,
            FuserInputs(self._hidden_states_of_fuser(outputs, side), side.get("tasks")),
            boundary,
            states,
            latent_logits,
            router,
        )

    def run_student(self, side: Mapping[str, Any], captured: AbstractContextManager[Any]) -> Any:
        """Run the pass that predicts tokens inside ``captured``; return transformers' outputs."""
        options = {"output_hidden_states": True} if self._reads_hidden_states else {}
        if self.latents is None or self.latent is None:
            with captured:
                return self.student(
                    input_ids=side["input_ids"],
                    attention_mask=side["attention_mask"],
                    use_cache=False,
                    **options,
                )
        kept = logits_kept(self.student, side, writers=self.latent.spec.step_cross_entropy > 0)
        refined = refine_latents(self.student, self.latents, side["before"], side["before_mask"])
        with captured:
            return final_pass(self.student, refined, side, **options, **kept)

    @contextmanager
    def _dropout_of_its_own(self, device: torch.device) -> Iterator[None]:
        """Draw random numbers that do not depend on how many the teachers' side has drawn."""
        if self.dropout_seed is None or not self.training:
            yield
            return
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.dropout_seed)
            yield

    def compared_positions(self, cache: Cache, side: Mapping[str, Tensor]) -> Cache:
        """Return the positions that are compared: all, or the latent tokens'."""
        if self.latents is None:
            return cache
        columns = latent_columns(side)
        return cache.map(lambda x, _: x[:, :, :, columns])

    @property
    def _reads_hidden_states(self) -> bool:
        compares_codi = self.latent is not None and self.latent.codi is not None
        return compares_codi or self.hidden is not None or self._fuser_needs_hidden

    @property
    def _fuser_needs_hidden(self) -> bool:
        return bool(getattr(self.pipeline.fuser, "needs_hidden", False))

    def _hidden_states_of_fuser(self, outputs: Any, side: Mapping[str, Tensor]) -> Tensor | None:
        if not self._fuser_needs_hidden:
            return None
        hidden: Tensor = outputs.hidden_states[-1].detach()
        return hidden if self.latents is None else hidden[:, latent_columns(side)]

    def _answer_boundary(self, outputs: Any, side: Mapping[str, Tensor]) -> Tensor | None:
        if self.latent is None or self.latent.codi is None:
            return None
        first_of_answer = outputs.hidden_states[0].shape[1] - side["after"].shape[1]
        return states_at_answer_boundary(outputs.hidden_states, side["answer_boundary"] + first_of_answer)

    def _latent_writer_logits(self, outputs: Any, side: Mapping[str, Tensor]) -> Tensor | None:
        if self.latent is None or not self.latent.spec.step_cross_entropy:
            return None
        return writer_logits(outputs.logits, side)

    # terms that do not compare caches

    def other_terms(self, step: Step, batch: StepBatch) -> list[Term]:
        """Return the terms of logits, hidden states and latent tokens."""
        terms = []
        if step.student.aux_loss is not None:
            terms.append(Term(AUX_LOSS, aux_loss_weight(self.student), step.student.aux_loss))
        terms += self._logit_terms(step, batch)
        if self.hidden is not None and step.student.hidden_states is not None:
            value = self.hidden(
                step.student.hidden_states, step.teachers, batch.teachers, batch.timeline, batch.denominators
            )
            terms.append(self.term_weights.weigh(HIDDEN, value))
        if self.latent is not None:
            terms += self._latent_terms(self.latent, step, batch)
        return terms

    def _logit_terms(self, step: Step, batch: StepBatch) -> list[Term]:
        logits, passes, denominators = step.student.logits, step.teachers, batch.denominators
        terms = []
        if self.logits is not None:
            value = logit_term(logits, passes, batch.student, batch.teachers, denominators, self.logits)
            terms.append(self.term_weights.weigh(LOGITS, value))
        if self.cross_logits is not None:
            value = self.cross_logits(logits, passes, batch.student, batch.teachers, denominators)
            terms.append(self.term_weights.weigh(CROSS_LOGITS, value))
        return terms

    def _latent_terms(self, latent: LatentSetup, step: Step, batch: StepBatch) -> list[Term]:
        terms = []
        if step.student.answer_boundary is not None and latent.codi is not None:
            value = self._codi_value(step.student.answer_boundary, step.teachers, batch)
            terms.append(self.term_weights.weigh(CODI, value))
        if step.student.latent_writer_logits is not None:
            value = step_cross_entropy(
                step.student.latent_writer_logits, batch.student["trace"], batch.denominators
            )
            terms.append(Term(STEPS, latent.spec.step_cross_entropy, value))
        own = self.own_teacher
        for teacher_pass in step.teachers:
            if own is not None and teacher_pass.teacher == own.name and teacher_pass.logits is not None:
                labels = batch.teachers[own.name]["labels"]
                value = cross_entropy(teacher_pass.logits, labels, batch.denominators[READ])
                terms.append(Term(READING, latent.reading_weight, value))
        return terms

    def _codi_value(self, boundary: Tensor, passes: Sequence[TeacherPass], batch: StepBatch) -> Tensor:
        # Its teacher runs in every step: a spec whose fuser might leave it out is refused.
        theirs = next(given for given in passes if given.hidden_states is not None)
        assert theirs.hidden_states is not None
        where = batch.teachers[theirs.teacher]["answer_boundary"].to(theirs.hidden_states[0].device)
        their_boundary = states_at_answer_boundary(theirs.hidden_states, where)
        return codi_term(boundary, their_boundary.to(boundary.device), batch.denominators)

    def _reward_fuser(self, ce: Tensor, batch: StepBatch) -> None:
        """In training, give a fuser that learns from it the mean cross-entropy of this forward pass."""
        if self.training and isinstance(self.pipeline.fuser, Rewarded):
            total = ce.detach() * batch.denominators[LABELLED]
            labelled = batch.student["labels"][:, 1:].ne(NO_LABEL).sum().clamp_min(1)
            self.pipeline.reward_fuser(total / labelled)

    # teachers

    @property
    def own_teacher(self) -> OwnTeacher | None:
        """Return the teacher that is the student itself; None if there is none."""
        own = (teacher for teacher in self.teachers if isinstance(teacher, OwnTeacher))
        return next(own, None)

    def place_teachers(self, device: torch.device, placements: Mapping[str, str] | None = None) -> None:
        """Bring the teachers to where the spec places them.

        Args:
            device: that of the batches, where teachers without a placement go.
            placements: by name.

        Raises:
            SpecError: processes would wait for each other at a sharded teacher that only some of them drew.
        """
        placements = placements or {}
        for teacher in self.teachers:
            teacher.to(device, placements.get(teacher.name, REPLICATED))
        self._check_sharded_teachers_always_run(placements)
        if any(on_other_gpu(placement, device) for placement in placements.values()):
            self._side_stream = SideStream(device)
            self.choose_alignment(stream=self._streams)

    def _check_sharded_teachers_always_run(self, placements: Mapping[str, str]) -> None:
        sharded = [name for name, placement in placements.items() if placement == SHARDED]
        fuser = self.pipeline.fuser
        draws = isinstance(fuser, Chooses) and getattr(fuser, "draws", True)
        if sharded and draws and processes_met() > 1:
            raise SpecError(
                f"teacher {sharded[0]!r}: placement: sharded: the fuser draws teachers, each process by "
                "itself; place it replicated, or choose another fuser"
            )

    # counting

    def loss_denominators(self, batch: Mapping[str, Any]) -> Float[Tensor, "4"]:
        """Count what a batch adds to the numbers that the terms are divided by."""
        own = None if self.own_teacher is None else self.own_teacher.name
        return loss_denominators(self.at_curriculum_stage(batch["student"]), batch["teachers"], own)

    def attach_ledger(self, ledger: Ledger) -> None:
        """Let a ledger count what teachers, and a student of latent tokens, read."""
        for teacher in self.teachers:
            teacher.ledger = ledger
        if self.latents is not None:
            ledger.watch(self.student, decoder_of(self.student))

    def count_student_pass(self, ledger: Ledger, student: Mapping[str, Tensor]) -> None:
        """Enter the student's side of a batch into the ledger."""
        mask = self.at_curriculum_stage(student)["attention_mask"]
        ledger.add_tokens(STUDENT, mask)
        if self.latents is None:
            ledger.add_text(STUDENT, mask, ledger.backward, head=True)

    def model_configs(self) -> dict[str, PreTrainedConfig]:
        """Return the config of the student and of every other model that runs, by name."""
        configs: dict[str, Any] = {STUDENT: self.student.config}
        for teacher in self.teachers:
            if not isinstance(teacher, OwnTeacher):
                configs[teacher.name] = teacher.model.config
        return configs


def _weighted_terms(
    logits: LogitsSpec | None,
    cross_logits: CrossLogits | None,
    hidden: AlignedStates | None,
    latent: LatentSetup | None,
) -> dict[str, WeightedTerm]:
    """Return the declarations of the terms beside KV losses, by name."""
    terms: dict[str, WeightedTerm] = {}
    if logits is not None:
        terms[LOGITS] = logits
    if cross_logits is not None:
        terms[CROSS_LOGITS] = cross_logits.spec
    if hidden is not None:
        terms[HIDDEN] = hidden.spec
    if latent is not None and latent.codi is not None:
        terms[CODI] = latent.codi
    return terms
