"""Train models on the spot before they teach (or are taught), and keep them in the cache.

Pretraining is an ordinary run with cross-entropy alone: one training loop for everything. An encoder learns
to restore corrupted texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kava_core.build.data import load_or_train_tokenizer
from kava_core.console import tell_once
from kava_core.data.examples import Example, render_example
from kava_core.data.splits import Splits, load_splits, split_hash, text_fingerprint
from kava_core.files import cache_folder
from kava_core.models.config import max_positions, model_config
from kava_core.specfile.questions import used_teachers
from kava_core.specfile.sections.data import DataSpec, change_data
from kava_core.specfile.sections.models import ModelSpec, Pretrain, StudentSpec, TrainTokenizer
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.specfile.sections.training import EvaluateSpec, TrainSpec


def pretraining_spec(spec: PipelineSpec, model: ModelSpec) -> PipelineSpec:
    """Return the run that trains ``model`` on the data of ``spec``, or its own changes of them.

    Nothing else of the spec enters it, and of ``evaluate`` nothing, so that runs share the trained model
    and find the same scores of it.
    """
    plan = model.pretrain
    assert plan is not None
    own = [name for name in ModelSpec.model_fields if name not in ("pretrain", "keep_layers")]
    fields: dict[str, Any] = {name: getattr(model, name) for name in own}
    if plan.data and isinstance(model.tokenizer, TrainTokenizer):
        fields["tokenizer"] = _full_tokenizer(spec, model)
    student, data = StudentSpec(**fields), _pretraining_data(spec, model)
    return type(spec)(
        name="pretrained",
        student=student,
        data=data,
        train=_train_section(plan, spec.train, all_tokens=model.encoder),
        evaluate=_evaluate_section(student, data, plan, max_length=spec.train.max_length),
        seeds=(plan.seed,),
        output=str(cache_folder()),
    )


def pretraining_name(spec: PipelineSpec, model: ModelSpec) -> str:
    """Return the run's variant: architecture, and hash of the training examples, which no path holds."""
    return f"{(model.config or {})['model_type']}-{split_hash(_pretraining_examples(spec, model))[:8]}"


def pretraining_report(spec: PipelineSpec) -> dict[str, dict[str, Any]]:
    """Return what every model that is trained on the spot learns from, and what of it the run also has.

    ``shared_with_train``, ``shared_with_validation``: examples of the run whose prompt is among them. Of
    models from a folder or hub nothing is known.
    """
    splits = load_splits(spec.data, root=Path.cwd())
    models: dict[str, ModelSpec] = {"student": spec.student}
    models |= {teacher.name: teacher for teacher in spec.teachers}
    report = {}
    for name, model in models.items():
        if model.pretrain is not None:
            report[name] = _describe_examples(_pretraining_examples(spec, model), splits)
    return report


def tell_random_teachers(spec: PipelineSpec) -> None:
    """Say on stderr, once in a process, which teachers know nothing: controls, and untrained weights."""
    for teacher in used_teachers(spec):
        if teacher.stand_in is not None:
            kind = teacher.stand_in.kind
            tell_once(f"teacher {teacher.name!r}: a control is in its place (stand_in: {kind})")
            continue
        if teacher.itself is not None or teacher.path is not None or teacher.pretrain is not None:
            continue
        tell_once(f"teacher {teacher.name!r}: random weights ('config' without 'pretrain'): it knows nothing")


def _describe_examples(learnt: Sequence[Example], splits: Splits) -> dict[str, Any]:
    prompts = {text_fingerprint(example.prompt) for example in learnt}
    description: dict[str, Any] = {"examples": len(learnt), "sha256": split_hash(learnt)}
    for name, split in (("train", splits.train), ("validation", splits.validation)):
        shared = sum(text_fingerprint(example.prompt) in prompts for example in split)
        description[f"shared_with_{name}"] = shared
    return description


def _pretraining_data(spec: PipelineSpec, model: ModelSpec) -> DataSpec:
    """Return the spec's data with the changes that ``pretrain`` asks for; a teacher's own text is none."""
    changes = model.pretrain.data if model.pretrain is not None else {}
    return change_data(spec.data, changes) if changes else spec.data


def _pretraining_examples(spec: PipelineSpec, model: ModelSpec) -> Sequence[Example]:
    return load_splits(_pretraining_data(spec, model), root=Path.cwd()).train


def _full_tokenizer(spec: PipelineSpec, model: ModelSpec) -> str:
    """Return the folder of the tokenizer trained on all of the spec's texts: others may lack its words."""
    splits = load_splits(spec.data, root=Path.cwd())
    template = _pretraining_data(spec, model).template
    return str(load_or_train_tokenizer(model, splits, template, where="pretrain").name_or_path)


def _evaluate_section(
    student: StudentSpec, data: DataSpec, plan: Pretrain, *, max_length: int
) -> EvaluateSpec:
    """Return the section ``evaluate``: once, at the end, with answers as long as those of the data.

    An encoder writes none, and nor does a model without positions for them.
    """
    room = 0 if student.encoder else _room_for_answers(student, data, max_length)
    return EvaluateSpec(
        every=plan.steps, batch_size=plan.batch_size, generate=room > 0, max_new_tokens=max(room, 1)
    )


def _room_for_answers(student: StudentSpec, data: DataSpec, max_length: int) -> int:
    """Return the tokens of the longest written steps and answer of the validation examples, with its end.

    It is at most what the model's positions leave after the longest prompt; 0 without such examples.
    """
    splits = load_splits(data, root=Path.cwd())
    tokenizer = load_or_train_tokenizer(student, splits, data.template, where="pretrain")
    examples = splits.validation[: EvaluateSpec().examples]
    texts = [render_example(example, data.template) for example in examples]
    prompts = _token_counts(tokenizer, [text.prompt_part.text for text in texts])
    lengths = _token_counts(tokenizer, [text.text for text in texts])
    kept = [(prompt, length) for prompt, length in zip(prompts, lengths, strict=True) if length <= max_length]
    longest = max((length - prompt for prompt, length in kept), default=-1) + 1
    positions = max_positions(model_config(student, tokenizer, where="pretrain"))
    if positions is None:
        return longest
    return max(0, min(longest, positions - max((prompt for prompt, _ in kept), default=0)))


def _token_counts(tokenizer: Any, texts: list[str]) -> list[int]:
    return [len(tokens) for tokens in tokenizer(texts)["input_ids"]] if texts else []


def _train_section(plan: Pretrain, train: TrainSpec, *, all_tokens: bool) -> TrainSpec:
    return TrainSpec(
        steps=plan.steps,
        batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        warmup_steps=max(1, plan.steps // 20),
        max_length=train.max_length,
        loss_on="all" if all_tokens else train.loss_on,
        precision=train.precision,
        log_every=max(1, plan.steps // 10),
        save_every=max(100, plan.steps // 4),
        keep_checkpoints=1,
    )
