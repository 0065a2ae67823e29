"""Train models on the spot before they teach (or are taught), and keep them in the cache.

Pretraining is an ordinary run with cross-entropy alone: one training loop for everything. An encoder learns
to restore corrupted texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kava_core.build.data import load_or_train_tokenizer
from kava_core.data.examples import Example
from kava_core.data.splits import Splits, load_splits, split_hash, text_fingerprint
from kava_core.files import cache_folder
from kava_core.specfile.sections.data import DataSpec, change_data
from kava_core.specfile.sections.models import ModelSpec, Pretrain, StudentSpec, TrainTokenizer
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.specfile.sections.training import EvaluateSpec, TrainSpec


def pretraining_spec(spec: PipelineSpec, model: ModelSpec) -> PipelineSpec:
    """Return the run that trains ``model`` on the data of ``spec``, or its own changes of them.

    Nothing else of the spec enters it, so that variants share the trained model.
    """
    plan = model.pretrain
    assert plan is not None
    fields = {name: getattr(model, name) for name in ModelSpec.model_fields if name != "pretrain"}
    if plan.data and isinstance(model.tokenizer, TrainTokenizer):
        fields["tokenizer"] = _full_tokenizer(spec, model)
    return type(spec)(
        name="pretrained",
        student=StudentSpec(**fields),
        data=_pretraining_data(spec, model),
        train=_train_section(plan, spec.train, all_tokens=model.encoder),
        evaluate=_evaluate_section(spec, model, plan),
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


def _evaluate_section(spec: PipelineSpec, model: ModelSpec, plan: Pretrain) -> EvaluateSpec:
    """Return the section ``evaluate``: at the end, with answers unless the model cannot write them.

    A student of latent tokens cannot, as ``max_new_tokens`` has no room for written steps; an encoder writes
    none.
    """
    changes: dict[str, Any] = {"every": plan.steps, "controls": False}
    if model.encoder or spec.trajectory == "latent":
        changes["generate"] = False
    return EvaluateSpec(**spec.evaluate.model_dump() | changes)


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
