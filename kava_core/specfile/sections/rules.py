"""List which settings of a spec may go together: one row for every rule, with the text of its error.

A row is what a person reads (``when`` and ``what``), a question about the spec (``broken``) and the answer
that the user of a wrong spec gets (``message``). The order counts: only the first broken rule is reported,
and a row may rely on those before it. ``kava check --rules`` and docs/reference/spec.md print the table. To
add a rule, add a row here and a spec that breaks it in tests/specfile/test_rules.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from kava_core.specfile.sections.data import change_data
from kava_core.specfile.sections.losses import LogitsSpec, TeachersTerm
from kava_core.specfile.sections.models import ModelSpec, TeacherSpec

if TYPE_CHECKING:
    from kava_core.specfile.sections.pipeline import PipelineSpec

RESERVED_TEACHER_NAMES = ("student", "alignment")
"""What records and tables call something else than a teacher."""


@dataclass(frozen=True)
class Rule:
    """One demand that a spec has to meet, across its blocks."""

    name: str
    """Short and stable, such as ``online-store``."""
    when: str
    """The setting that brings the demand, for people."""
    what: str
    """What must be so then, for people."""
    broken: Callable[[PipelineSpec], str | bool]
    """Whether a spec breaks the rule. If the message has a ``{}``: the words for it, none if it does not."""
    message: str
    """The error. Neighbours with the same message become one error, their words joined by commas."""


def first_error(spec: PipelineSpec) -> str | None:
    """Return the error of the first rule that a spec breaks; None if it keeps all of them.

    Raises:
        pydantic.ValidationError: changes of ``data`` for pretraining do not fit ``data``.
    """
    for message, neighbours in groupby(RULES, key=_message_of):
        answers = [rule.broken(spec) for rule in neighbours]
        words = [str(answer) for answer in answers if answer]
        if words:
            return message.replace("{}", ", ".join(words))
    return None


def _message_of(rule: Rule) -> str:
    return rule.message


def _words_if(condition: object, words: str) -> str:
    """Return the words if the condition holds, else none."""
    return words if condition else ""


def _teacher_names(spec: PipelineSpec) -> list[str]:
    return [teacher.name for teacher in spec.teachers]


def _model_named_beside_itself(spec: PipelineSpec) -> str:
    """Return the first teacher that is the student itself and yet names a model, and the field."""
    for teacher in spec.teachers:
        if teacher.itself is None:
            continue
        given = teacher.model_fields_set
        for field in ("quantize", "placement"):
            if field in given and getattr(teacher, field) not in (None, "replicated"):
                return f"{teacher.name!r} is the student itself: leave out {field!r}"
        for field in given & set(ModelSpec.model_fields):
            if getattr(teacher, field) != getattr(spec.student, field):
                return f"{teacher.name!r} is the student itself: leave out {field!r}"
    return ""


def _teacher_stood_in_for(spec: PipelineSpec, reason: str) -> str:
    """Return the first teacher with a stand-in that a reason forbids, and the stand-in.

    Args:
        spec: the whole.
        reason: ``itself``, ``quantize``, ``logits``, ``cross_logits``, ``hidden`` or ``codi``.
    """
    for teacher in spec.teachers:
        if teacher.stand_in is None:
            continue
        forbidden = {
            "itself": teacher.itself is not None,
            "quantize": teacher.quantize is not None and teacher.has_weights,
            "logits": _takes_part(teacher, spec.logits),
            "cross_logits": _takes_part(teacher, spec.cross_logits),
            "hidden": _takes_part(teacher, spec.hidden) and not teacher.has_weights,
            "codi": spec.codi is not None and spec.codi.teacher in (None, teacher.name),
        }
        if forbidden[reason]:
            return f"{teacher.name!r}: stand_in {teacher.stand_in.kind!r}"
    return ""


def _takes_part(teacher: TeacherSpec, term: LogitsSpec | TeachersTerm | None) -> bool:
    """Return whether a term of a spec, if it has that, looks at this teacher."""
    return term is not None and (term.teachers is None or teacher.name in term.teachers)


def _shared_teacher_names(spec: PipelineSpec) -> str:
    names = _teacher_names(spec)
    return _words_if(len(set(names)) != len(names), ", ".join(names))


def _reserved_teacher_name(spec: PipelineSpec) -> str:
    reserved = [name for name in _teacher_names(spec) if name in RESERVED_TEACHER_NAMES]
    return repr(reserved[0]) if reserved else ""


def _pretraining_data_does_not_fit(spec: PipelineSpec) -> bool:
    """Return False, or raise pydantic's own errors about the changed ``data``."""
    for model in (spec.student, *spec.teachers):
        if model.pretrain is not None and model.pretrain.data:
            change_data(spec.data, model.pretrain.data)
    return False


def _first_unfit_warper(spec: PipelineSpec) -> tuple[str, str]:
    """Return the rule that the first unfit time warper of a teacher breaks, and the words for its message.

    Teacher by teacher, so that the error is about the first of them, whatever rule it breaks.
    """
    is_latent = spec.trajectory == "latent"
    for teacher in spec.teachers:
        for field in ("token_warper", "time_warper"):
            warper = getattr(teacher.align, field)
            if warper is None:
                continue
            if teacher.own_text and warper.same_text:
                text = f"{teacher.name!r} reads another text than the student ({teacher.own_text[0]})"
                return "warper-same-text", f"{text}, but {field} {warper.name!r}"
            if is_latent and warper.whole_text:
                return "warper-whole-text", f"{teacher.name!r}: {field} {warper.name!r}"
            if not is_latent and warper.latent_only:
                return "warper-latent-only", f"{teacher.name!r}: {field} {warper.name!r}"
    return "", ""


def _unfit_warper(rule_name: str) -> Callable[[PipelineSpec], str]:
    """Make the question whether the first unfit time warper breaks this rule."""

    def words(spec: PipelineSpec) -> str:
        broken_rule, description = _first_unfit_warper(spec)
        return _words_if(broken_rule == rule_name, description)

    return words


def _unknown_teacher(spec: PipelineSpec, section: str) -> str:
    """Return the first teacher that a section of losses names and the spec has not, and where."""
    term = getattr(spec, section)
    if term is None:
        return ""
    names = _teacher_names(spec)
    for field in ("teachers", "teacher_weights"):
        for name in getattr(term, field, None) or ():
            if name not in names:
                return f"'{section}.{field}': no teacher {name!r}; there are {', '.join(names)}"
    return ""


def _spans_of_another_text(spec: PipelineSpec) -> str:
    if spec.cross_logits is None or spec.cross_logits.form != "spans":
        return ""
    for teacher in spec.teachers:
        if teacher.own_text and _takes_part(teacher, spec.cross_logits):
            return f"teacher {teacher.name!r} reads another ({teacher.own_text[0]})"
    return ""


def _cross_logits_of_an_encoder(spec: PipelineSpec) -> str:
    for teacher in spec.teachers:
        if teacher.encoder and _takes_part(teacher, spec.cross_logits):
            return repr(teacher.name)
    return ""


def _teachers_that_are_the_student(spec: PipelineSpec) -> list[str]:
    return [teacher.name for teacher in spec.teachers if teacher.itself is not None]


def _itself_without_latent(spec: PipelineSpec) -> str:
    names = _teachers_that_are_the_student(spec)
    return f"teacher {names[0]!r}: itself" if names and spec.trajectory != "latent" else ""


def _codi_teacher_not_chosen(spec: PipelineSpec) -> str:
    if spec.codi is None or spec.codi.teacher is not None or len(spec.teachers) == 1:
        return ""
    return ", ".join(_teacher_names(spec)) or "the teachers: there is none"


def _unknown_codi_teacher(spec: PipelineSpec) -> str:
    names = _teacher_names(spec)
    if spec.codi is None or spec.codi.teacher is None or spec.codi.teacher in names:
        return ""
    return f"{spec.codi.teacher!r}; there are {', '.join(names)}"


def _curriculum_beside_latent_terms(spec: PipelineSpec) -> bool:
    if spec.trajectory != "latent" or spec.latent.curriculum is None:
        return False
    return bool(spec.losses or spec.codi is not None or spec.latent.step_cross_entropy)


def _steps_too_few_for_curriculum(spec: PipelineSpec) -> str:
    curriculum = spec.latent.curriculum
    if spec.trajectory != "latent" or curriculum is None:
        return ""
    needed = curriculum.steps * (spec.latent.count // curriculum.tokens)
    return _words_if(spec.train.steps <= needed, f"{needed} steps, but 'train.steps' is {spec.train.steps}")


def _without_latent_tokens(spec: PipelineSpec) -> bool:
    return spec.trajectory == "latent" and spec.latent.count == 0


def _trains_by_share(spec: PipelineSpec) -> bool:
    terms = (*spec.losses, spec.logits, spec.cross_logits, spec.hidden, spec.codi)
    return any(term is not None and term.share is not None for term in terms)


def _online_share_of_no_example(spec: PipelineSpec) -> str:
    """Return the share and the batch of which it is no example at all, or every one though it is below 1."""
    if spec.online is None:
        return ""
    share, batch_size = spec.online.share, spec.train.batch_size
    written = round(share * batch_size)
    useless = written == 0 or (share < 1 and written == batch_size)
    return _words_if(useless, f"{share} of 'train.batch_size' {batch_size}")


def _is_all_online(spec: PipelineSpec) -> bool:
    return spec.online is not None and spec.online.share == 1


def _online_teacher_of_another_text(spec: PipelineSpec) -> str:
    if spec.online is None:
        return ""
    for teacher in spec.teachers:
        if teacher.own_text:
            return f"{teacher.name!r} reads another text than the student ({teacher.own_text[0]})"
    return ""


def _encoder_names(spec: PipelineSpec) -> set[str]:
    return {teacher.name for teacher in spec.teachers if teacher.encoder}


def _encoder_among_all_logit_teachers(spec: PipelineSpec) -> bool:
    return bool(_encoder_names(spec)) and spec.logits is not None and spec.logits.teachers is None


def _codi_of_an_encoder(spec: PipelineSpec) -> str:
    teacher = spec.codi.teacher if spec.codi is not None else None
    return repr(teacher) if teacher in _encoder_names(spec) else ""


def _logits_of_an_encoder(spec: PipelineSpec) -> str:
    asked = spec.logits.teachers if spec.logits is not None else None
    encoders = [name for name in asked or () if name in _encoder_names(spec)]
    return f"{encoders[0]}': teacher {encoders[0]!r}" if encoders else ""


_NEEDS_LATENT = "{}: needs 'trajectory: latent'"
_NO_LATENT_TOKENS = "'latent.count': 0 leaves no latent tokens for {}"
_NOT_WITH_LATENT = "'trajectory: latent' does not go together with {} yet"
_NOT_WITH_ONLINE = "'online' does not go together with {}"
_NO_LABELS = "'online.share': 1 leaves no labels for {}"
_NOT_WITH_ENCODER = "'student.encoder': an encoder writes nothing; not with {}"


def _needs_a_teacher(section: str) -> Rule:
    return Rule(
        f"{_dashed(section)}-teacher",
        when=f"`{section}` is given",
        what="there is at least one teacher",
        broken=lambda spec: getattr(spec, section) is not None and not spec.teachers,
        message=f"'{section}' needs at least one teacher",
    )


def _names_known_teachers(section: str) -> Rule:
    return Rule(
        f"{_dashed(section)}-unknown-teacher",
        when=f"`{section}` names teachers",
        what="there are teachers of these names",
        broken=lambda spec: _unknown_teacher(spec, section),
        message="{}",
    )


def _needs_no_store(section: str, read: str) -> Rule:
    """Return the rule for a term that reads of running teachers what no store holds."""
    return Rule(
        f"{_dashed(section)}-store",
        when=f"`{section}` is given",
        what=f"`store` is null: a store holds no {read}",
        broken=lambda spec: getattr(spec, section) is not None and spec.store is not None,
        message=f"'{section}' needs teachers that run, and a store holds no {read}; set 'store: null'",
    )


def _dashed(section: str) -> str:
    return section.replace("_", "-")


RULES: tuple[Rule, ...] = (
    # Teachers
    Rule(
        "itself-model",
        when="a teacher is `itself`",
        what="it names no model of its own: it is the student",
        broken=_model_named_beside_itself,
        message="teacher {}",
    ),
    Rule(
        "teacher-names-differ",
        when="there are several teachers",
        what="they have different names",
        broken=_shared_teacher_names,
        message="teachers must have different names, not {}",
    ),
    Rule(
        "teacher-name-reserved",
        when="a teacher is called `student` or `alignment`",
        what="it gets another name: records use that one",
        broken=_reserved_teacher_name,
        message="a teacher cannot be called {}: records use that name",
    ),
    Rule(
        "losses-teacher",
        when="`losses` are given",
        what="there is at least one teacher",
        broken=lambda spec: bool(spec.losses and not spec.teachers),
        message="'losses' need at least one teacher",
    ),
    Rule(
        "pretrain-data",
        when="`pretrain.data` changes the data",
        what="`data` has these fields and takes these values",
        broken=_pretraining_data_does_not_fit,
        message="pydantic's errors about the changed data",
    ),
    # Controls in a teacher's place
    Rule(
        "stand-in-itself",
        when="a teacher has a `stand_in`",
        what="it is not `itself`: the student cannot be replaced",
        broken=lambda spec: _teacher_stood_in_for(spec, "itself"),
        message="teacher {} replaces a teacher, and this one is the student itself",
    ),
    Rule(
        "stand-in-quantize",
        when="a teacher has a `stand_in` with weights",
        what="`quantize` is null: rounded weights can be neither drawn nor permuted",
        broken=lambda spec: _teacher_stood_in_for(spec, "quantize"),
        message="teacher {} changes weights, and quantised ones cannot be changed; set its 'quantize: null', "
        "or use token_identity, which has none",
    ),
    Rule(
        "stand-in-logits",
        when="a teacher has a `stand_in`",
        what="its logits are not distilled: they would teach noise",
        broken=lambda spec: _teacher_stood_in_for(spec, "logits"),
        message="teacher {} is a control of caches, and its logits are noise or none; set 'logits: null'",
    ),
    Rule(
        "stand-in-cross-logits",
        when="a teacher has a `stand_in`",
        what="its logits are not distilled across tokenizers: they would teach noise",
        broken=lambda spec: _teacher_stood_in_for(spec, "cross_logits"),
        message="teacher {} is a control of caches, and its logits are noise or none; set "
        "'cross_logits: null'",
    ),
    Rule(
        "stand-in-hidden",
        when="a teacher has a `stand_in` without weights",
        what="`hidden` does not read its states: it has none",
        broken=lambda spec: _teacher_stood_in_for(spec, "hidden"),
        message="teacher {} has keys and values alone, and no hidden states; use random_weights, or set "
        "'hidden: null'",
    ),
    Rule(
        "stand-in-codi",
        when="a teacher has a `stand_in`",
        what="`codi` does not read its hidden states",
        broken=lambda spec: _teacher_stood_in_for(spec, "codi"),
        message="teacher {} is a control of caches, and its hidden states are noise or none; set 'codi: "
        "null'",
    ),
    # Time warpers
    Rule(
        "warper-same-text",
        when="a teacher reads a text of its own (`template`, `rationale`, `last_step`)",
        what="its warpers do not compare characters, as char_iou does",
        broken=_unfit_warper("warper-same-text"),
        message="teacher {} compares the characters of one text; use segment",
    ),
    Rule(
        "warper-whole-text",
        when="`trajectory: latent`",
        what="no warper matches whole texts: latent tokens stand for the reasoning alone",
        broken=_unfit_warper("warper-whole-text"),
        message="teacher {} matches whole texts, and latent tokens stand for the reasoning alone; use "
        "segment, uniform, crop or rkv",
    ),
    Rule(
        "warper-latent-only",
        when="`trajectory: text`",
        what="no warper chooses tokens for latent ones",
        broken=_unfit_warper("warper-latent-only"),
        message="teacher {} chooses tokens for latent ones and needs 'trajectory: latent'; uniform, crop and "
        "segment do not",
    ),
    # Logits
    _needs_a_teacher("logits"),
    _names_known_teachers("logits"),
    Rule(
        "logits-shuffled",
        when="`logits` is given",
        what="`train.shuffle_teacher` is false: another example has other tokens",
        broken=lambda spec: spec.logits is not None and spec.train.shuffle_teacher,
        message="'train.shuffle_teacher' puts another example beside the student, whose tokens are others; "
        "set 'logits: null'",
    ),
    _needs_no_store("logits", "logits"),
    _needs_a_teacher("cross_logits"),
    _names_known_teachers("cross_logits"),
    Rule(
        "cross-logits-same-text",
        when="`cross_logits.form: spans`",
        what="its teachers read the student's text (no `template`, `rationale`, `last_step`)",
        broken=_spans_of_another_text,
        message="'cross_logits.form: spans' compares the characters of one text, but {}; use form: sorted",
    ),
    _needs_no_store("cross_logits", "logits"),
    # Hidden states
    _needs_a_teacher("hidden"),
    _names_known_teachers("hidden"),
    _needs_no_store("hidden", "hidden states"),
    # Latent tokens
    Rule(
        "itself-once",
        when="a teacher is `itself`",
        what="no other teacher is",
        broken=lambda spec: _words_if(
            len(_teachers_that_are_the_student(spec)) > 1, ", ".join(_teachers_that_are_the_student(spec))
        ),
        message="only one teacher can be the student itself, not {}",
    ),
    Rule(
        "codi-latent",
        when="`codi` is given",
        what="`trajectory: latent`",
        broken=lambda spec: _words_if(spec.codi is not None and spec.trajectory != "latent", "codi"),
        message=_NEEDS_LATENT,
    ),
    Rule(
        "controls-latent",
        when="`evaluate.controls: true`",
        what="`trajectory: latent`",
        broken=lambda spec: _words_if(
            spec.evaluate.controls and spec.trajectory != "latent", "evaluate.controls"
        ),
        message=_NEEDS_LATENT,
    ),
    Rule(
        "itself-latent",
        when="a teacher is `itself`",
        what="`trajectory: latent`",
        broken=_itself_without_latent,
        message=_NEEDS_LATENT,
    ),
    Rule(
        "codi-teacher",
        when="`codi` is given, and not exactly one teacher",
        what="`codi.teacher` names one",
        broken=_codi_teacher_not_chosen,
        message="'codi.teacher': name one of {}",
    ),
    Rule(
        "codi-unknown-teacher",
        when="`codi.teacher` names a teacher",
        what="there is a teacher of this name",
        broken=_unknown_codi_teacher,
        message="'codi.teacher': no teacher {}",
    ),
    Rule(
        "curriculum-terms",
        when="`latent.curriculum` is given",
        what="no `losses`, no `codi`, no `latent.step_cross_entropy`: early stages lack what they compare",
        broken=_curriculum_beside_latent_terms,
        message="'latent.curriculum' does not go together with losses, codi or step_cross_entropy",
    ),
    Rule(
        "curriculum-steps",
        when="`latent.curriculum` is given",
        what="`train.steps` reach beyond the step that brings the last latent tokens",
        broken=_steps_too_few_for_curriculum,
        message="'latent.curriculum': all latent tokens are there after {}",
    ),
    Rule(
        "no-latent-losses",
        when="`latent.count: 0`",
        what="no `losses`",
        broken=lambda spec: _words_if(_without_latent_tokens(spec) and spec.losses, "losses"),
        message=_NO_LATENT_TOKENS,
    ),
    Rule(
        "no-latent-step-cross-entropy",
        when="`latent.count: 0`",
        what="`latent.step_cross_entropy` is 0",
        broken=lambda spec: _words_if(
            _without_latent_tokens(spec) and spec.latent.step_cross_entropy > 0, "latent.step_cross_entropy"
        ),
        message=_NO_LATENT_TOKENS,
    ),
    Rule(
        "no-latent-controls",
        when="`latent.count: 0`",
        what="`evaluate.controls: false`",
        broken=lambda spec: _words_if(
            _without_latent_tokens(spec) and spec.evaluate.controls, "evaluate.controls"
        ),
        message=_NO_LATENT_TOKENS,
    ),
    Rule(
        "latent-logits",
        when="`trajectory: latent`",
        what="`logits` is null",
        broken=lambda spec: _words_if(spec.trajectory == "latent" and spec.logits is not None, "logits"),
        message=_NOT_WITH_LATENT,
    ),
    Rule(
        "latent-cross-logits",
        when="`trajectory: latent`",
        what="`cross_logits` is null",
        broken=lambda spec: _words_if(
            spec.trajectory == "latent" and spec.cross_logits is not None, "cross_logits"
        ),
        message=_NOT_WITH_LATENT,
    ),
    Rule(
        "latent-hidden",
        when="`trajectory: latent`",
        what="`hidden` is null: `codi` compares hidden states there",
        broken=lambda spec: _words_if(spec.trajectory == "latent" and spec.hidden is not None, "hidden"),
        message=_NOT_WITH_LATENT,
    ),
    Rule(
        "latent-store",
        when="`trajectory: latent`",
        what="`store` is null",
        broken=lambda spec: _words_if(spec.trajectory == "latent" and spec.store is not None, "store"),
        message=_NOT_WITH_LATENT,
    ),
    Rule(
        "latent-rotary",
        when="`trajectory: latent`",
        what="`rotary` is strip or keep",
        broken=lambda spec: _words_if(
            spec.trajectory == "latent" and spec.rotary == "match", "rotary: match"
        ),
        message=_NOT_WITH_LATENT,
    ),
    Rule(
        "latent-compile",
        when="`trajectory: latent`",
        what="`train.compile` is null",
        broken=lambda spec: _words_if(
            spec.trajectory == "latent" and spec.train.compile is not None, "train.compile"
        ),
        message=_NOT_WITH_LATENT,
    ),
    Rule(
        "itself-stream",
        when="a teacher is `itself`",
        what="`train.stream: false`",
        broken=lambda spec: _words_if(
            spec.trajectory == "latent" and spec.train.stream and _teachers_that_are_the_student(spec),
            "train.stream beside a teacher that is the student itself",
        ),
        message=_NOT_WITH_LATENT,
    ),
    Rule(
        "latent-frozen",
        when="`trajectory: latent`",
        what="`student.frozen: false`",
        broken=lambda spec: _words_if(spec.trajectory == "latent" and spec.student.frozen, "student.frozen"),
        message=_NOT_WITH_LATENT,
    ),
    # A frozen student
    Rule(
        "frozen-lora",
        when="`student.frozen: true`",
        what="`student.lora` is null",
        broken=lambda spec: spec.student.frozen and spec.student.lora is not None,
        message="'student.frozen' leaves no use for 'lora'",
    ),
    Rule(
        "frozen-share",
        when="`student.frozen: true`",
        what="no term has a `share`: there are no gradients to weigh",
        broken=lambda spec: spec.student.frozen and _trains_by_share(spec),
        message="'share' weighs gradients of the student's weights; with 'frozen' there are none",
    ),
    # Online distillation
    Rule(
        "online-latent",
        when="`online` is given",
        what="`trajectory: text`",
        broken=lambda spec: _words_if(
            spec.online is not None and spec.trajectory == "latent", "trajectory: latent"
        ),
        message=_NOT_WITH_ONLINE,
    ),
    Rule(
        "online-store",
        when="`online` is given",
        what="`store` is null: texts are new at every step",
        broken=lambda spec: _words_if(spec.online is not None and spec.store is not None, "store"),
        message=_NOT_WITH_ONLINE,
    ),
    Rule(
        "online-marker",
        when="`online` is given",
        what="`data.template.answer` has a marker before `{answer}`",
        broken=lambda spec: (
            spec.online is not None and not spec.data.template.answer.partition("{answer}")[0].strip()
        ),
        message="'online' needs a marker before {answer} in 'data.template.answer' to find it by",
    ),
    Rule(
        "online-share",
        when="`online` is given",
        what="`online.share` is at least one example of a batch and, below 1, not every one",
        broken=_online_share_of_no_example,
        message="'online.share': {} is none or all of it: use a larger batch (and less 'accumulate') or "
        "another share",
    ),
    Rule(
        "all-online-logits",
        when="`online.share: 1`",
        what="`logits` is null: no token has a label",
        broken=lambda spec: _words_if(_is_all_online(spec) and spec.logits is not None, "logits"),
        message=_NO_LABELS,
    ),
    Rule(
        "all-online-cross-logits",
        when="`online.share: 1`",
        what="`cross_logits` is null: no token has a label",
        broken=lambda spec: _words_if(_is_all_online(spec) and spec.cross_logits is not None, "cross_logits"),
        message=_NO_LABELS,
    ),
    Rule(
        "all-online-share",
        when="`online.share: 1`",
        what="no term has a `share`: there is no cross-entropy to be a share of",
        broken=lambda spec: _words_if(_is_all_online(spec) and _trains_by_share(spec), "terms with 'share'"),
        message=_NO_LABELS,
    ),
    Rule(
        "online-text",
        when="`online` is given",
        what="no teacher reads a text of its own (`template`, `rationale`, `last_step`)",
        broken=_online_teacher_of_another_text,
        message="'online': teacher {}, but all are to read what the student writes",
    ),
    # Encoders
    Rule(
        "encoder-teachers",
        when="`student.encoder: true`",
        what="there are no teachers",
        broken=lambda spec: _words_if(spec.student.encoder and spec.teachers, "teachers"),
        message=_NOT_WITH_ENCODER,
    ),
    Rule(
        "encoder-latent",
        when="`student.encoder: true`",
        what="`trajectory: text`",
        broken=lambda spec: _words_if(
            spec.student.encoder and spec.trajectory == "latent", "trajectory: latent"
        ),
        message=_NOT_WITH_ENCODER,
    ),
    Rule(
        "encoder-generate",
        when="`student.encoder: true`",
        what="`evaluate.generate: false`",
        broken=lambda spec: _words_if(
            spec.student.encoder and spec.evaluate.generate, "evaluate.generate: true"
        ),
        message=_NOT_WITH_ENCODER,
    ),
    Rule(
        "encoder-lora",
        when="`student.encoder: true`",
        what="`student.lora` is null",
        broken=lambda spec: _words_if(spec.student.encoder and spec.student.lora is not None, "student.lora"),
        message=_NOT_WITH_ENCODER,
    ),
    Rule(
        "encoder-checkpointing",
        when="`student.encoder: true`",
        what="`student.gradient_checkpointing: false`",
        broken=lambda spec: _words_if(
            spec.student.encoder and spec.student.gradient_checkpointing, "student.gradient_checkpointing"
        ),
        message=_NOT_WITH_ENCODER,
    ),
    Rule(
        "encoder-among-logits",
        when="a teacher is an encoder and `logits` is given",
        what="`logits.teachers` names those that predict tokens",
        broken=_encoder_among_all_logit_teachers,
        message="'logits.teachers': name teachers that are no encoders, which predict no tokens",
    ),
    Rule(
        "encoder-codi",
        when="a teacher is an encoder",
        what="it is not `codi.teacher`",
        broken=_codi_of_an_encoder,
        message="'codi.teacher': teacher {} is an encoder: it has caches alone",
    ),
    Rule(
        "encoder-logits",
        when="a teacher is an encoder",
        what="it is not among `logits.teachers`",
        broken=_logits_of_an_encoder,
        message="'logits.teachers: {} is an encoder: it has caches alone",
    ),
    Rule(
        "encoder-cross-logits",
        when="a teacher is an encoder",
        what="it is not among `cross_logits.teachers`",
        broken=_cross_logits_of_an_encoder,
        message="'cross_logits.teachers': teacher {} is an encoder: it predicts no tokens",
    ),
    # Everything else
    Rule(
        "stream-store",
        when="`train.stream: true`",
        what="`store` is null: a store needs no running teachers",
        broken=lambda spec: spec.train.stream and spec.store is not None,
        message="'train.stream' is about teachers that run; a store needs none",
    ),
    Rule(
        "seeds-differ",
        when="there are several `seeds`",
        what="they differ from one another",
        broken=lambda spec: len(set(spec.seeds)) != len(spec.seeds),
        message="'seeds' must differ from one another",
    ),
    Rule(
        "shuffled-store",
        when="`train.shuffle_teacher: true`",
        what="`store` is null: no store holds caches of other examples",
        broken=lambda spec: spec.train.shuffle_teacher and spec.store is not None,
        message="'train.shuffle_teacher' aligns every teacher's cache to another example, which no store "
        "holds; set 'store: null'",
    ),
    Rule(
        "shuffled-codi",
        when="`train.shuffle_teacher: true`",
        what="`codi` is null, or its weight is 0",
        broken=lambda spec: spec.train.shuffle_teacher and spec.codi is not None and spec.codi.weight > 0,
        message="'train.shuffle_teacher' would give CODI's term another example's states as well; set 'codi: "
        "null'",
    ),
)
"""Every rule, in the order in which they are looked at."""
