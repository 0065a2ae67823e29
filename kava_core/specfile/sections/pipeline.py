"""Describe everything a run is made of. Field docstrings are the spec reference in docs/.

The component fields are typed ``ComponentConfig`` here; ``kava_core.specfile.bind`` narrows them to the
declarations that are installed. What may go together is listed in ``kava_core.specfile.sections.rules``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kava_core.config import ComponentConfig, KVLossConfig, Strict
from kava_core.specfile.sections.compare import CompareSpec, Name
from kava_core.specfile.sections.data import DataSpec
from kava_core.specfile.sections.latent import LatentSpec
from kava_core.specfile.sections.losses import CodiSpec, CrossLogitsSpec, HiddenSpec, LogitsSpec
from kava_core.specfile.sections.models import ModelSpec, StudentSpec, TeacherSpec
from kava_core.specfile.sections.rules import first_error
from kava_core.specfile.sections.training import EvaluateSpec, OnlineSpec, StoreSpec, TrainSpec


class PipelineSpec(Strict):
    """A whole spec: the student, its teachers, how caches are aligned, fused and compared, and the run."""

    name: Name
    """Name of the run, and of its folder under ``output``. Example: ``gsm8k-kv``."""
    student: StudentSpec
    """The model that is trained."""
    teachers: tuple[TeacherSpec, ...] = ()
    """The models whose caches are distilled. Example: ``[{name: big, path: Qwen/Qwen3-1.7B}]``."""
    rotary: Literal["strip", "keep", "match"] = "strip"
    """How rotated keys and queries are compared. ``strip``: without rotation, which is undone by each model's
    own angles; ``keep``: as they are in the cache; ``match``: the teacher's rotation is undone and, after
    alignment, applied again with the student's positions and base."""
    target: Literal["separate", "fused"] = "separate"
    """What the student is compared with. ``separate``: with every teacher, and the losses are averaged with
    the fuser's weights; ``fused``: with the average of the aligned caches, which only means something if they
    share a basis (calibrated projections of two teachers do not)."""
    fuser: ComponentConfig = Field(default={"name": "fixed"})  # type: ignore[assignment]
    """How much each teacher counts, where and when. Example: ``{name: fixed, weights: {big: 2, small:
    1}}``."""
    losses: tuple[KVLossConfig, ...] = ()
    """KV losses, added to the student's cross-entropy; none: cross-entropy alone. Example:
    ``[{name: mse, weight: 0.1}]``."""
    trajectory: Literal["text", "latent"] = "text"
    """What the student has between prompt and answer: ``text``, the written steps; or ``latent`` tokens,
    which are compared with the teachers' reasoning. Teachers always read written steps."""
    latent: LatentSpec = LatentSpec()
    """The latent tokens, with ``trajectory: latent``."""
    codi: CodiSpec | None = None
    """With latent tokens: also compare the hidden states before the answer with a teacher's; null: do not."""
    logits: LogitsSpec | None = None
    """Also distil next-token distributions, from teachers with the student's vocabulary; null: do not."""
    cross_logits: CrossLogitsSpec | None = None
    """Also distil next-token distributions from teachers with any tokenizer; null: do not."""
    hidden: HiddenSpec | None = None
    """Also distil hidden states, aligned as caches are; null: do not."""
    data: DataSpec
    """Where examples come from."""
    train: TrainSpec
    """The optimisation."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """Validation during training."""
    online: OnlineSpec | None = None
    """Let the student write a part of the training texts; null: all are the data's."""
    store: StoreSpec | None = None
    """Train from aligned caches written before by ``kava cache``; null: run the teachers at every step."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field((0,), min_length=1)
    """Seeds; there is one run for each. A seed fixes the student's weights, the data order and dropout.
    Example: ``[0, 1, 2]``."""
    variants: dict[Name, dict[str, Any]] = Field(default={})
    """Named changes of this spec: dotted path to new value, as on the command line. There is one run for each
    variant and seed; none: one variant, ``main``. Example: ``{deep: {losses.0.layers: [-1]}, base: {}}``."""
    compare: CompareSpec | None = None
    """The comparisons of the variants that ``kava experiment`` makes; null: none."""
    output: str = "runs"
    """Folder that all runs are written into."""

    @model_validator(mode="after")
    def _keep_rules(self) -> PipelineSpec:
        error = first_error(self)
        if error is not None:
            raise ValueError(error)
        # A frozen model's own validator may complete it; copies of it would not be validated.
        self.__dict__["teachers"] = tuple(_with_model(teacher, self.student) for teacher in self.teachers)
        return self


def _with_model(teacher: TeacherSpec, student: StudentSpec) -> TeacherSpec:
    """Return the teacher, with the student's model if it is the student itself."""
    if teacher.itself is None:
        return teacher
    model = {name: getattr(student, name) for name in ModelSpec.model_fields}
    return teacher.model_copy(update=model)
