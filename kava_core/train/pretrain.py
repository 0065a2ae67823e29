"""Models that are trained on the spot before they teach (or are taught), and kept in the cache.

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
from kava_core.paths import cache_folder
from kava_core.specfile.sections.data import DataSpec, change_data
from kava_core.specfile.sections.models import ModelSpec, Pretrain, StudentSpec, TrainTokenizer
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.specfile.sections.training import EvaluateSpec, TrainSpec


def pretraining_spec(spec: PipelineSpec, model: ModelSpec) -> PipelineSpec:
    """The run that trains ``model`` on the data of ``spec``, or its own changes of them.

    Nothing else of the spec enters it, so that variants share the trained model.
    """
    plan = model.pretrain
    assert plan is not None
    fields = {name: getattr(model, name) for name in ModelSpec.model_fields if name != "pretrain"}
    if plan.data and isinstance(model.tokenizer, TrainTokenizer):
        fields["tokenizer"] = _tokenizer_of_all(spec, model)
    return type(spec)(
        name="pretrained",
        student=StudentSpec(**fields),
        data=_data(spec, model),
        train=_train(plan, spec.train, all_tokens=model.encoder),
        evaluate=_evaluate(spec, model, plan),
        seeds=(plan.seed,),
        output=str(cache_folder()),
    )


def pretraining_name(spec: PipelineSpec, model: ModelSpec) -> str:
    """The run's variant: architecture and hash of the training examples, which a path does not hold."""
    examples = load_splits(_data(spec, model), root=Path.cwd()).train
    return f"{(model.config or {})['model_type']}-{split_hash(examples)[:8]}"


def pretraining_report(spec: PipelineSpec) -> dict[str, dict[str, Any]]:
    """What every model that is trained on the spot learns from, by name, and how much of it the run also has.

    ``shared_with_train``, ``shared_with_validation``: examples of the run whose prompt is among them. Of
    models from a folder or hub nothing is known.
    """
    splits = load_splits(spec.data, root=Path.cwd())
    models = {"student": spec.student} | {teacher.name: teacher for teacher in spec.teachers}
    return {
        name: _shared(load_splits(_data(spec, model), root=Path.cwd()).train, splits)
        for name, model in models.items()
        if model.pretrain is not None
    }


def _shared(learnt: Sequence[Example], splits: Splits) -> dict[str, Any]:
    prompts = {text_fingerprint(example.prompt) for example in learnt}
    found: dict[str, Any] = {"examples": len(learnt), "sha256": split_hash(learnt)}
    for name, split in (("train", splits.train), ("validation", splits.validation)):
        found[f"shared_with_{name}"] = sum(text_fingerprint(example.prompt) in prompts for example in split)
    return found


def _data(spec: PipelineSpec, model: ModelSpec) -> DataSpec:
    """The spec's data with the changes that ``pretrain`` asks for; a teacher's own text is none of them."""
    changes = model.pretrain.data if model.pretrain is not None else {}
    return change_data(spec.data, changes) if changes else spec.data


def _tokenizer_of_all(spec: PipelineSpec, model: ModelSpec) -> str:
    """The folder of the tokenizer trained on all of the spec's texts: others may lack its words."""
    splits = load_splits(spec.data, root=Path.cwd())
    return str(
        load_or_train_tokenizer(model, splits, _data(spec, model).template, where="pretrain").name_or_path
    )


def _evaluate(spec: PipelineSpec, model: ModelSpec, plan: Pretrain) -> EvaluateSpec:
    """Without answers for a student of latent tokens, as ``max_new_tokens`` has no room for written steps,
    and of an encoder, which writes none."""
    changes = {"every": plan.steps, "controls": False}
    changes |= {"generate": False} if model.encoder or spec.trajectory == "latent" else {}
    return EvaluateSpec(**spec.evaluate.model_dump() | changes)


def _train(plan: Pretrain, train: TrainSpec, *, all_tokens: bool) -> TrainSpec:
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
