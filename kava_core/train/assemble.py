"""Everything one run needs, made from its spec: tokenizers, data, models, the distiller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kava_core.data.collate import Collator, Reading
from kava_core.data.dataset import EncodedDataset
from kava_core.data.encode import prefix_mismatch
from kava_core.data.examples import render
from kava_core.data.splits import Splits, load_splits, split_hash
from kava_core.data.tokenizers import load_tokenizer
from kava_core.errors import CheckpointError, SpecError
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.eviction import Eviction
from kava_core.kv.capture.geometry import geometry_of, probe_geometry
from kava_core.kv.compare.freeze_unused import freeze_unused
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.latent.collate import LatentCollator, with_thought_tokens
from kava_core.latent.tokens import LatentTokens
from kava_core.paths import cache_folder
from kava_core.protocols.axes import Geometry
from kava_core.protocols.fuser import Rewarded
from kava_core.specfile.questions import active, felt, heard, parts_of, used_teachers, weights_key
from kava_core.specfile.sections.models import ModelSpec, TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.store.index import PROJECTORS
from kava_core.store.reader import Store
from kava_core.train.distiller import Distiller, Latent
from kava_core.train.logits import assert_same_vocabulary
from kava_core.train.models import load_model, load_student, model_config
from kava_core.train.own_teacher import OwnTeacher
from kava_core.train.room import assert_room, assert_room_to_write
from kava_core.train.teacher import Teacher


@dataclass(frozen=True)
class Data:
    """Examples, tokenizers and encoded items of a run."""

    splits: Splits
    tokenizer: PreTrainedTokenizerBase
    """The student's."""
    teacher_tokenizers: Mapping[str, PreTrainedTokenizerBase]
    collator: Collator
    """For training: rotates the teachers where the spec asks for that control."""
    plain_collator: Collator
    """For calibration and evaluation."""
    train_items: EncodedDataset
    validation_items: EncodedDataset
    store: Store | None = None
    """Where the collators read the teachers' targets; None runs the teachers."""

    def longest(self) -> dict[str | None, int]:
        """Most tokens of an example on the side of every teacher, by name, and of the student, under None."""
        items = [*self.train_items.items, *self.validation_items.items]
        most: dict[str | None, int] = {None: max(len(item.student) for item in items)}
        for name in self.teacher_tokenizers:
            most[name] = max(len(item.teachers[name].input_ids) for item in items)
        return most

    def longest_prompt(self) -> int:
        """Most tokens of a validation example's prompt, for the student."""
        return max(item.student.prompt_length for item in self.validation_items.items)

    def report(self) -> dict[str, Any]:
        """For run.json: sizes, hashes, duplicates, examples left out."""
        dropped = {"train": self.train_items.dropped, "validation": self.validation_items.dropped}
        mismatches = prefix_mismatch(
            self.validation_items.examples, self.tokenizer, self.plain_collator.template
        )
        sides = {"train": self.train_items, "validation": self.validation_items}
        kept = {name: split_hash(items.examples) for name, items in sides.items()}
        more = {"too_long": dropped, "kept": kept, "prompt_prefix_mismatches": mismatches}
        return self.splits.report() | more


def tokenizer_of(model: ModelSpec, splits: Splits, template: Any, *, where: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer: loaded, or trained on the training texts (cached)."""
    texts = (render(example, template).text for example in splits.train)
    try:
        return load_tokenizer(model, texts=texts, cache=cache_folder() / "tokenizers")
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error


def reading_of(spec: PipelineSpec, teacher: TeacherSpec) -> Reading:
    """The text a teacher reads."""
    return Reading(teacher.template or spec.data.template, teacher.rationale, teacher.last_step)


def make_data(spec: PipelineSpec, idle: Sequence[TeacherSpec] = ()) -> Data:
    """Load, split, tokenize.

    ``idle``: teachers that may not run, but whose ``max_length`` counts too: variants with and without them
    then learn from the same examples.
    """
    splits = load_splits(spec.data, root=Path.cwd())
    template = spec.data.template
    tokenizer = tokenizer_of(spec.student, splits, template, where="student")
    used = {teacher.name: teacher for teacher in used_teachers(spec)}
    declared = {teacher.name: teacher for teacher in idle} | used
    readings = {name: reading_of(spec, teacher) for name, teacher in declared.items()}
    tokenizers = {
        name: tokenizer
        if teacher.itself is not None
        else tokenizer_of(teacher, splits, readings[name].template, where=f"teacher {name!r}")
        for name, teacher in declared.items()
    }
    teachers = {name: tokenizers[name] for name in used}
    kind: Any = Collator
    if spec.trajectory == "latent":
        tokenizer = with_thought_tokens(tokenizer)
        kind = partial(LatentCollator, latent=spec.latent)
    make = partial(
        kind,
        tokenizer,
        template=template,
        loss_on=spec.train.loss_on,
        max_length=spec.train.max_length,
        readings=readings,
        separator=spec.data.separator,
    )
    plain, every = make(teacher_tokenizers=teachers), make(teacher_tokenizers=tokenizers)
    encoded = partial(EncodedDataset, collator=every, teachers=teachers)
    return Data(
        splits,
        tokenizer,
        teachers,
        collator=make(teacher_tokenizers=teachers, shuffle_teacher=spec.train.shuffle_teacher),
        plain_collator=plain,
        train_items=encoded(splits.train),
        validation_items=encoded(splits.validation[: spec.evaluate.examples]),
    )


def make_distiller(spec: PipelineSpec, data: Data, *, seed: int) -> Distiller:
    """Student, pipeline and teachers; the student's weights depend on the seed alone."""
    latent = spec.trajectory == "latent"
    student: Any = load_student(spec.student, data.tokenizer, seed=seed, grow=latent)
    how: dict[str, Any] = {"latent": make_latent(spec, student, seed=seed) if latent else None}
    assert_room(student.config, data.longest()[None], who="student")
    if spec.evaluate.generate:
        assert_room_to_write(student.config, data.longest_prompt(), spec.evaluate.max_new_tokens)
    if spec.online is not None:
        most = max(item.student.prompt_length for item in data.train_items.items)
        field = "online.max_new_tokens"
        assert_room_to_write(student.config, most, spec.online.max_new_tokens, field=field)
    if not used_teachers(spec):
        assert_learns(spec, None)
        return Distiller(student, **how)
    if data.store is not None:
        return _reading_distiller(spec, data, data.store, student, seed)
    models = _checked_teachers(spec, data, student)
    geometries = {name: geometry_of(model) for name, model in models.items()} if active(spec) else {}
    pipeline = make_pipeline(spec, geometries, geometry_of(student), seed=seed) if geometries else None
    _check_heard(spec, pipeline)
    if (
        spec.online is not None
        and spec.online.share == 1
        and isinstance(pipeline and pipeline.fuser, Rewarded)
    ):
        raise SpecError("online.share: 1 leaves no labels, and the fuser learns from their cross-entropy")
    return Distiller(
        student,
        pipeline,
        make_teachers(spec, models, pipeline),
        **how,
        parts=parts_of(spec),
        rotary=spec.rotary,
        stream=spec.train.stream,
        logits=spec.logits if heard(spec) else None,
    )


def assert_learns(spec: PipelineSpec, pipeline: KVPipeline | None) -> None:
    """SpecError where nothing would be trained."""
    learns = pipeline is not None and any(p.requires_grad for p in pipeline.parameters())
    if spec.student.frozen and not learns:
        raise SpecError("student.frozen: no aligner or router is trained either, so nothing would learn")


def _checked_teachers(spec: PipelineSpec, data: Data, student: Any) -> dict[str, Any]:
    """The teachers' models, by name; SpecError where one cannot read, or be, what it is to."""
    for name in heard(spec):
        assert_same_vocabulary(data.tokenizer, data.teacher_tokenizers[name], who=f"teacher {name!r}")
    _check_rationales(spec, data)
    models, longest = load_teachers(spec, data, student), data.longest()
    if (whose := felt(spec)) is not None:
        _assert_same_states(models[whose].config, student.config, whose)
    for name, model in models.items():
        assert_room(model.config, longest[name], who=f"teacher {name!r}")
    return models


def make_teachers(
    spec: PipelineSpec, models: Mapping[str, Any], pipeline: KVPipeline | None
) -> list[Teacher]:
    """Models that are run for their caches, their logits or both."""
    layers = {aligner.name: aligner.sources for aligner in pipeline.teachers} if pipeline is not None else {}
    evictions = {a.name: eviction_of(spec, a) for a in pipeline.teachers} if pipeline is not None else {}
    how: dict[str, Any] = {"parts": parts_of(spec), "rotary": spec.rotary}
    own = {t.name: t.itself.cross_entropy for t in spec.teachers if t.itself is not None}

    def teacher(name: str, model: Any) -> Teacher:
        found = {"layers": layers.get(name, ()), "eviction": evictions.get(name)} | how
        if name in own:
            return OwnTeacher(name, model, logits=own[name] > 0, hidden=name == felt(spec), **found)
        return Teacher(name, model, logits=name in heard(spec), hidden=name == felt(spec), **found)

    return [teacher(name, model) for name, model in models.items()]


def _assert_same_states(teacher: Any, student: Any, name: str) -> None:
    """SpecError where hidden states cannot be compared one by one."""
    sides = [config.get_text_config() for config in (teacher, student)]
    (depth, width), own = ((side.num_hidden_layers, side.hidden_size) for side in sides)
    if (depth, width) != own:
        raise SpecError(
            f"codi: teacher {name!r} has {depth} layers of width {width}, the student {own[0]} of {own[1]}; "
            "CODI's term compares them one by one: use losses, which align"
        )


def eviction_of(spec: PipelineSpec, aligner: TeacherAligner) -> Eviction | None:
    """How a teacher's reasoning is cut down to the latent tokens; None where no time warper does."""
    if aligner.evictor is None:
        return None
    how: dict[str, Any] = {"parts": parts_of(spec), "rotary": spec.rotary}
    who = f"the time warper of teacher {aligner.name!r}"
    return Eviction(aligner.evictor, spec.latent.count, **how, who=who)


def _check_rationales(spec: PipelineSpec, data: Data) -> None:
    """SpecError for a teacher that asks for another rationale where no example has one."""
    for teacher in used_teachers(spec):
        if teacher.rationale and not any(example.rationales for example in data.train_items.examples):
            raise SpecError(
                f"teacher {teacher.name!r}: rationale: {teacher.rationale}, but no training example has "
                "'rationales'; `kava sample` writes them"
            )


def _check_heard(spec: PipelineSpec, pipeline: KVPipeline | None) -> None:
    """SpecError for a teacher that something beside the KV losses needs but that does not run."""
    if pipeline is None:
        return
    hidden = felt(spec)
    needed = {} if hidden is None else {hidden: "codi"}
    needed |= {t.name: "itself" for t in spec.teachers if t.itself is not None and t.itself.cross_entropy}
    if pipeline.draws and (found := [name for name in pipeline.names if name in needed]):
        raise SpecError(
            f"{needed[found[0]]}: the fuser draws teachers, so {found[0]!r} would not run in every step; "
            "use fixed weights without 'sample'"
        )
    if pipeline.draws:
        return
    needed = {name: "logits" for name in heard(spec)} | needed
    for name, runs in zip(pipeline.names, pipeline.choose(), strict=True):
        if name in needed and not runs:
            raise SpecError(
                f"{needed[name]}: teacher {name!r} has weight 0 in the fuser, so it does not run; name "
                "another teacher, or give it a weight"
            )


def make_latent(spec: PipelineSpec, student: Any, *, seed: int) -> Latent:
    """The latent tokens, whose own weights depend on the seed alone."""
    how = spec.latent
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = student.get_input_embeddings().weight.shape[1]
        tokens = LatentTokens(how.count, how.passes, width, how.projection, begin=how.begin)
    reading = sum(t.itself.cross_entropy for t in spec.teachers if t.itself is not None)
    return Latent(tokens, how, spec.codi if felt(spec) else None, float(reading))


def load_teachers(spec: PipelineSpec, data: Data, student: Any = None) -> dict[str, Any]:
    """Every teacher's model, by name; teachers that differ only in what they read share one.

    ``student`` is the model of a teacher that is the student itself.
    """
    models: dict[str, Any] = {}
    loaded: dict[Any, Any] = {}
    for teacher in used_teachers(spec):
        if teacher.itself is not None:
            models[teacher.name] = student
            continue
        tokenizer = data.teacher_tokenizers[teacher.name]
        key = weights_key(teacher), tuple(sorted(tokenizer.get_vocab().items()))
        if key not in loaded:
            loaded[key] = load_model(teacher, tokenizer, seed=0, where=f"teacher {teacher.name!r}")
        models[teacher.name] = loaded[key]
    return models


def _reading_distiller(
    spec: PipelineSpec, data: Data, store: Store, student: nn.Module, seed: int
) -> Distiller:
    """Without teachers: their geometry is known from their configs, their targets lie in the store."""
    pipeline = make_pipeline(spec, config_geometries(spec, data), geometry_of(student), seed=seed)
    load_projectors(pipeline, store.folder / PROJECTORS)
    return Distiller(student, pipeline, parts=parts_of(spec), rotary=spec.rotary)


def config_geometries(spec: PipelineSpec, data: Data) -> dict[str, Geometry]:
    """Every teacher's geometry, by name; no model is loaded."""
    tokenizers = data.teacher_tokenizers
    return {
        t.name: config_geometry(t, tokenizers[t.name], where=f"teacher {t.name!r}") for t in spec.teachers
    }


def config_geometry(model: ModelSpec, tokenizer: PreTrainedTokenizerBase, *, where: str) -> Geometry:
    """A model's geometry, from its config."""
    return probe_geometry(model_config(model, tokenizer, where=where))


def projectors(pipeline: KVPipeline) -> dict[str, Tensor]:
    """The state of calibrated projectors, which is computed before the first step."""
    return {
        f"{aligner.name}/{name}": tensor.detach().cpu().contiguous()
        for aligner in pipeline.teachers
        if aligner.wants_calibration
        for name, tensor in aligner.dim_projector.state_dict().items()
    }


def load_projectors(pipeline: KVPipeline, file: Path) -> None:
    """Load what ``projectors`` gave; CheckpointError where it does not fit."""
    try:
        saved = load_file(file)
        for aligner in pipeline.teachers:
            if aligner.wants_calibration:
                mine = f"{aligner.name}/"
                state = {name.removeprefix(mine): x for name, x in saved.items() if name.startswith(mine)}
                aligner.dim_projector.load_state_dict(state)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {str(error).splitlines()[0]}") from error


def make_pipeline(
    spec: PipelineSpec, teachers: Mapping[str, Geometry], student: Geometry, *, seed: int
) -> KVPipeline:
    """The pipeline with its weights drawn from the seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = KVPipeline(spec, teachers=teachers, student=student)
    freeze_unused(pipeline, parts=parts_of(spec), student=student)
    assert_learns(spec, pipeline)
    return pipeline
