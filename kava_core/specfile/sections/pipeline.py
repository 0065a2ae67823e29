"""PipelineSpec: everything a run is made of. Field docstrings are the spec reference in docs/.

The component fields are typed ``ComponentConfig`` here; ``kava_core.specfile.bind`` narrows them to the
declarations that are installed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kava_core.config import ComponentConfig, KVLossConfig, Strict
from kava_core.specfile.sections.compare import CompareSpec, Name
from kava_core.specfile.sections.data import DataSpec, changed_data
from kava_core.specfile.sections.latent import LatentSpec
from kava_core.specfile.sections.losses import CodiSpec, LogitsSpec
from kava_core.specfile.sections.models import ModelSpec, StudentSpec, TeacherSpec
from kava_core.specfile.sections.training import EvaluateSpec, OnlineSpec, StoreSpec, TrainSpec

RESERVED = ("student", "alignment")
"""What records and tables call something else than a teacher."""


class PipelineSpec(Strict):
    """A student, its teachers, how their caches are aligned, fused and compared, and the run."""

    name: Name
    """Name of the run; its folder under ``output``."""
    student: StudentSpec
    """The model that is trained."""
    teachers: tuple[TeacherSpec, ...] = ()
    """The models that are distilled."""
    rotary: Literal["strip", "keep", "match"] = "strip"
    """``strip``: compare keys and queries without rotation, undone by each model's own angles; ``keep``: as
    cached; ``match``: the teacher's rotation is undone and, once aligned, done again with the student's
    positions and base."""
    target: Literal["separate", "fused"] = "separate"
    """``separate``: the student is compared with every teacher, and the losses are averaged with the fuser's
    weights; ``fused``: the aligned caches are averaged first, which only means something where they share a
    basis (calibrated projections of two teachers do not)."""
    fuser: ComponentConfig = Field(default={"name": "fixed"})  # type: ignore[assignment]
    """How much each teacher counts, where and when."""
    losses: tuple[KVLossConfig, ...] = ()
    """KV losses, added to the student's cross-entropy. None: cross-entropy alone."""
    trajectory: Literal["text", "latent"] = "text"
    """What stands between prompt and answer of the student: written steps, or ``latent`` tokens, which are
    compared with the teachers' reasoning. Teachers always read written steps."""
    latent: LatentSpec = LatentSpec()
    """The latent tokens."""
    codi: CodiSpec | None = None
    """With latent tokens: draw the hidden states before the answer to a teacher's."""
    logits: LogitsSpec | None = None
    """Distil next-token distributions as well, from teachers with the student's vocabulary."""
    data: DataSpec
    """Where examples come from."""
    train: TrainSpec
    """The optimisation."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """Validation during training."""
    online: OnlineSpec | None = None
    """Let the student write a part of the texts; null: all are the data's."""
    store: StoreSpec | None = None
    """Train from aligned caches written before by ``kava cache``; null: run the teachers at every step."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field((0,), min_length=1)
    """One run for each. A seed fixes the student's weights, the data order and dropout."""
    variants: dict[Name, dict[str, Any]] = Field(default={})
    """Named changes of this spec: dotted path to new value, as on the command line. One run for each variant
    and seed; none: one variant, ``main``."""
    compare: CompareSpec | None = None
    """What ``kava experiment`` asks of the variants."""
    output: str = "runs"
    """Folder of run directories."""

    @model_validator(mode="after")
    def _fits_together(self) -> PipelineSpec:
        # A frozen model's own validator may complete it; copies of it would not be validated.
        self.__dict__["teachers"] = tuple(_as_student(teacher, self.student) for teacher in self.teachers)
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"teachers must have different names, not {', '.join(names)}")
        if taken := [name for name in names if name in RESERVED]:
            raise ValueError(f"a teacher cannot be called {taken[0]!r}: records use that name")
        if self.losses and not self.teachers:
            raise ValueError("'losses' need at least one teacher")
        self._check_pretraining_data()
        self._check_texts()
        self._check_logits(names)
        self._check_latent()
        self._check_frozen()
        self._check_online()
        self._check_encoders()
        if self.train.stream and self.store is not None:
            raise ValueError("'train.stream' is about teachers that run; a store needs none")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("'seeds' must differ from one another")
        self._check_shuffled()
        return self

    def _check_shuffled(self) -> None:
        if not self.train.shuffle_teacher:
            return
        if self.store is not None:
            raise ValueError(
                "'train.shuffle_teacher' aligns every teacher's cache to another example, which no store "
                "holds; set 'store: null'"
            )
        if self.codi is not None and self.codi.weight:
            raise ValueError(
                "'train.shuffle_teacher' would give CODI's term another example's states as well; set "
                "'codi: null'"
            )

    def _check_frozen(self) -> None:
        if not self.student.frozen:
            return
        if self.student.lora is not None:
            raise ValueError("'student.frozen' leaves no use for 'lora'")
        if any(loss.share is not None for loss in self.losses):
            raise ValueError(
                "'share' weighs gradients of the student's weights; with 'frozen' there are none"
            )

    def _check_online(self) -> None:
        if self.online is None:
            return
        clashes = {"trajectory: latent": self.trajectory == "latent", "store": self.store is not None}
        if found := [name for name, clash in clashes.items() if clash]:
            raise ValueError(f"'online' does not go together with {', '.join(found)}")
        if not self.data.template.answer.partition("{answer}")[0].strip():
            raise ValueError(
                "'online' needs a marker before {answer} in 'data.template.answer' to find it by"
            )
        size, share = self.train.batch_size, self.online.share
        if round(share * size) == 0 or (share < 1 and round(share * size) == size):
            raise ValueError(
                f"'online.share': {share} of 'train.batch_size' {size} is none or all of it: use a larger "
                "batch (and less 'accumulate') or another share"
            )
        without_labels = {
            "logits": self.logits is not None,
            "losses with 'share'": any(loss.share is not None for loss in self.losses),
        }
        if share == 1 and (found := [name for name, given in without_labels.items() if given]):
            raise ValueError(f"'online.share': 1 leaves no labels for {', '.join(found)}")
        for teacher in self.teachers:
            if teacher.own_text:
                raise ValueError(
                    f"'online': teacher {teacher.name!r} reads another text than the student "
                    f"({teacher.own_text[0]}), but all are to read what the student writes"
                )

    def _check_encoders(self) -> None:
        if self.student.encoder:
            clashes = {
                "teachers": bool(self.teachers),
                "trajectory: latent": self.trajectory == "latent",
                "evaluate.generate: true": self.evaluate.generate,
                "student.lora": self.student.lora is not None,
                "student.gradient_checkpointing": self.student.gradient_checkpointing,
            }
            if found := [name for name, clash in clashes.items() if clash]:
                raise ValueError(f"'student.encoder': an encoder writes nothing; not with {', '.join(found)}")
        encoders = {teacher.name for teacher in self.teachers if teacher.encoder}
        asked: dict[str, str | None] = {"codi.teacher": self.codi.teacher if self.codi is not None else None}
        asked |= {f"logits.teachers: {name}": name for name in (self.logits and self.logits.teachers) or ()}
        if encoders and self.logits is not None and self.logits.teachers is None:
            raise ValueError("'logits.teachers': name teachers that are no encoders, which predict no tokens")
        for where, name in asked.items():
            if name in encoders:
                raise ValueError(f"'{where}': teacher {name!r} is an encoder: it has caches alone")

    def _check_latent(self) -> None:
        own = [teacher.name for teacher in self.teachers if teacher.itself is not None]
        if len(own) > 1:
            raise ValueError(f"only one teacher can be the student itself, not {', '.join(own)}")
        if self.trajectory != "latent":
            wanted = {"codi": self.codi is not None, "evaluate.controls": self.evaluate.controls}
            wanted |= {f"teacher {name!r}: itself": True for name in own}
            if found := [name for name, is_wanted in wanted.items() if is_wanted]:
                raise ValueError(f"{', '.join(found)}: needs 'trajectory: latent'")
            return
        self._check_codi()
        self._check_stages()
        unused = {
            "losses": bool(self.losses),
            "latent.step_cross_entropy": self.latent.step_cross_entropy > 0,
            "evaluate.controls": self.evaluate.controls,
        }
        if self.latent.count == 0 and (found := [name for name, given in unused.items() if given]):
            raise ValueError(f"'latent.count': 0 leaves no latent tokens for {', '.join(found)}")
        clashes = {
            "logits": self.logits is not None,
            "store": self.store is not None,
            "rotary: match": self.rotary == "match",
            "train.compile": self.train.compile is not None,
            "train.stream beside a teacher that is the student itself": bool(own) and self.train.stream,
            "student.frozen": self.student.frozen,
        }
        if found := [name for name, clash in clashes.items() if clash]:
            raise ValueError(f"'trajectory: latent' does not go together with {', '.join(found)} yet")

    def _check_codi(self) -> None:
        if self.codi is None:
            return
        names = [teacher.name for teacher in self.teachers]
        if self.codi.teacher is None and len(names) != 1:
            raise ValueError(
                f"'codi.teacher': name one of {', '.join(names) or 'the teachers: there is none'}"
            )
        if self.codi.teacher is not None and self.codi.teacher not in names:
            raise ValueError(
                f"'codi.teacher': no teacher {self.codi.teacher!r}; there are {', '.join(names)}"
            )

    def _check_stages(self) -> None:
        """A curriculum ends with all latent tokens, and has no use for what compares them before."""
        stages = self.latent.curriculum
        if stages is None:
            return
        if self.losses or self.codi is not None or self.latent.step_cross_entropy:
            raise ValueError(
                "'latent.curriculum' does not go together with losses, codi or step_cross_entropy"
            )
        needed = stages.steps * (self.latent.count // stages.tokens)
        if self.train.steps <= needed:
            raise ValueError(
                f"'latent.curriculum': all latent tokens are there after {needed} steps, but 'train.steps' "
                f"is {self.train.steps}"
            )

    def _check_logits(self, names: list[str]) -> None:
        if self.logits is None:
            return
        if not names:
            raise ValueError("'logits' needs at least one teacher")
        if unknown := [name for name in self.logits.teachers or () if name not in names]:
            raise ValueError(f"'logits.teachers': no teacher {unknown[0]!r}; there are {', '.join(names)}")
        if self.train.shuffle_teacher:
            raise ValueError(
                "'train.shuffle_teacher' puts another example beside the student, whose tokens are others; "
                "set 'logits: null'"
            )
        if self.store is not None:
            raise ValueError(
                "'logits' needs teachers that run, and a store holds no logits; set 'store: null'"
            )

    def _check_texts(self) -> None:
        for teacher in self.teachers:
            own = teacher.own_text
            for field in ("token_warper", "time_warper"):
                warper = getattr(teacher.align, field)
                if warper is None:
                    continue
                if own and warper.same_text:
                    raise ValueError(
                        f"teacher {teacher.name!r} reads another text than the student ({own[0]}), but "
                        f"{field} {warper.name!r} compares the characters of one text; use segment"
                    )
                if self.trajectory == "latent" and warper.whole_text:
                    raise ValueError(
                        f"teacher {teacher.name!r}: {field} {warper.name!r} matches whole texts, and latent "
                        "tokens stand for the reasoning alone; use segment, uniform, crop or rkv"
                    )
                if self.trajectory != "latent" and warper.latent_only:
                    raise ValueError(
                        f"teacher {teacher.name!r}: {field} {warper.name!r} chooses tokens for latent ones "
                        "and needs 'trajectory: latent'; uniform, crop and segment do not"
                    )

    def _check_pretraining_data(self) -> None:
        for model in (self.student, *self.teachers):
            if model.pretrain is not None and model.pretrain.data:
                changed_data(self.data, model.pretrain.data)


def _as_student(teacher: TeacherSpec, student: StudentSpec) -> TeacherSpec:
    """The teacher with the student's model, where it is ``itself``; ValueError where it names another."""
    if teacher.itself is None:
        return teacher
    model = {name: getattr(student, name) for name in ModelSpec.model_fields}
    for name in ("quantize", "placement"):
        if name in teacher.model_fields_set and getattr(teacher, name) not in (None, "replicated"):
            raise ValueError(f"teacher {teacher.name!r} is the student itself: leave out {name!r}")
    for name in teacher.model_fields_set & set(model):
        if getattr(teacher, name) != model[name]:
            raise ValueError(f"teacher {teacher.name!r} is the student itself: leave out {name!r}")
    return teacher.model_copy(update=model)
