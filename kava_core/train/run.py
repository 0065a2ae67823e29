"""Train one run, a resolved spec with a variant's name and a seed, from start or from where it stopped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from kava_core.build.data import Data, make_data
from kava_core.build.distiller import make_distiller
from kava_core.build.kept_layers import kept_layers_of, with_kept_layers
from kava_core.build.layer_maps import with_measured_maps
from kava_core.build.provenance import plugin_code, run_provenance, used_configs
from kava_core.build.stored import with_store
from kava_core.build.time_plans import PlansTime
from kava_core.console import quiet, tell_once
from kava_core.costs.flops import step_passes
from kava_core.costs.recorded import recorded_compute, store_counts
from kava_core.data.collate import Collator
from kava_core.data.splits import load_splits
from kava_core.distill.distiller import Distiller
from kava_core.errors import Preempted, SpecError
from kava_core.models.config import max_positions
from kava_core.models.ledger import STUDENT, Ledger, reset_peak_memory
from kava_core.models.placement import SHARDED
from kava_core.models.stand_ins.token_identity import TokenTeacher
from kava_core.models.student import compile_forward
from kava_core.processes import is_main, world_size
from kava_core.runs import checkpoint
from kava_core.runs.folder import KEPT_LAYERS, Folder
from kava_core.specfile.advice import advice_on
from kava_core.specfile.questions import used_teachers
from kava_core.specfile.sections.models import ModelSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.before_training import calibrate_components, set_loss_weights
from kava_core.train.callbacks import (
    EvaluateAtEnd,
    MetricsFile,
    ScheduleWeights,
    ShowProgress,
    StopOnSignal,
)
from kava_core.train.own_texts import CollatorWithExamples, OwnTexts
from kava_core.train.pretrain import (
    pretraining_name,
    pretraining_report,
    pretraining_spec,
    tell_random_teachers,
)
from kava_core.train.save_student import save_student
from kava_core.train.trainer import KavaTrainer
from kava_core.train.training_arguments import training_arguments
from kava_core.train.validation.collapse_monitor import CollapseMonitor
from kava_core.train.validation.evaluator import Evaluator
from kava_core.train.validation.moved_weights import keep_first_weights, share_of_moved_weights
from kava_core.train.validation.save_attention_maps import save_attention_maps
from kava_core.train.validation.saved_student import check_saved_student, outputs_of_student
from kava_core.train.weights import load_weights

OVERLAPS = {
    "duplicates_across": "have a prompt that is also a training prompt",
    "contaminated": "share 13 words in a row of their prompt with a training prompt",
}
"""How the counts of validation examples that training has seen are told."""

M = TypeVar("M", bound=ModelSpec)


@dataclass(frozen=True)
class RunResult:
    """What a finished run came to."""

    variant: str
    seed: int
    folder: Path
    results: dict[str, Any]
    """Metrics of the last evaluation, and ``steps``."""
    trained: bool = True
    """Whether anything was trained now; else the run was complete already."""


def run(spec: PipelineSpec, *, variant: str, seed: int, wait: bool = False) -> RunResult:
    """Train, or resume, or skip what is already complete.

    Args:
        spec: the variant's, resolved.
        variant: its name.
        seed: the run's.
        wait: wait for another run that holds the directory, and take its result.

    Raises:
        SpecError, CheckpointError, NonFiniteError: exit codes 2, 5, 4.
        KavaError: another run holds the directory, or the disk is full.
        Preempted: stopped by a signal; everything is saved (exit code 75).
    """
    folder = Folder.planned(spec, variant, seed)
    trained = True
    with folder.lock(wait=wait) if is_main() else nullcontext():
        _wait_for_all_processes()
        if folder.complete:
            trained = False
            _check_same_data(spec, folder)
            folder.check_plugin_code(plugin_code(used_configs(spec)))
        else:
            with _recording_failure(folder):
                spec = with_pretrained_models(spec)
                with quiet():
                    _train(spec, folder)
    return RunResult(variant, seed, folder.path, folder.record()["results"], trained)


@contextmanager
def _recording_failure(folder: Folder) -> Iterator[None]:
    """Write down beside the run what ends it, other than a request to stop."""
    if is_main():
        folder.forget_failure()
    try:
        yield
    except Preempted:
        raise
    except Exception as error:
        if is_main():
            folder.fail(error)
        raise


def _wait_for_all_processes() -> None:
    """Wait for the process that holds the lock: from here on all find the directory in the same state."""
    if world_size() > 1:
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=30))
        state.wait_for_everyone()


def with_pretrained_models(spec: PipelineSpec) -> PipelineSpec:
    """Train every model that is to be pretrained, and choose the layers of those that are cut.

    Returns:
        The spec with folders in place of ``pretrain``, and numbers of layers in ``keep_layers``.
    """
    teachers = tuple(_with_pretrained_folder(spec, teacher) for teacher in used_teachers(spec))
    student = _with_pretrained_folder(spec, spec.student)
    return with_kept_layers(spec.model_copy(update={"teachers": teachers, "student": student}))


def _check_same_data(spec: PipelineSpec, folder: Folder) -> None:
    """Raise SpecError if a finished run was trained on other examples than the spec's files hold now."""
    if not load_splits(spec.data, root=Path.cwd()).same_as(folder.record()["data"]):
        raise SpecError(f"{folder.path}: the data changed since this run ended; give the run another name")


def _with_pretrained_folder(spec: PipelineSpec, model: M) -> M:
    """Return the model with its trained folder in place of its config."""
    if model.pretrain is None:
        return model
    plan = pretraining_spec(spec, model)
    result = run(plan, variant=pretraining_name(spec, model), seed=plan.seeds[0], wait=True)
    path = str(Folder(result.folder).student)
    return model.model_copy(update={"path": path, "tokenizer": path, "config": None, "pretrain": None})


def _train(spec: PipelineSpec, folder: Folder) -> None:
    """Train from the start or the newest checkpoint, and finish the run unless a signal stops it."""
    with StopOnSignal() as stop:
        spec, data = with_store(spec, make_data(spec, folder.spec.teachers), seed=folder.seed)
        if is_main():
            report = data.report()
            _tell_notices(spec, data, report)
            folder.check_data(report)
            folder.check_plugin_code(plugin_code(used_configs(spec)))
        spec = with_measured_maps(spec, folder.layer_maps, data, seed=folder.seed)
        if is_main():
            folder.begin(_beginning_record(spec, folder, data, report))
        distiller = make_distiller(spec, data, seed=folder.seed)
        if is_main():
            tell_random_teachers(folder.spec)
        if spec.train.compile is not None:
            compile_forward(distiller.student, spec.train.compile)
        trainer = _make_trainer(spec, folder, data, distiller, stop)
        placements = {teacher.name: teacher.placement for teacher in spec.teachers}
        distiller.place_teachers(trainer.args.device, placements)
        _train_to_the_end(trainer, distiller, spec, folder, data)
        if trainer.state.global_step < spec.train.steps:
            if is_main():
                folder.stop()
            raise Preempted(_describe_stop(folder, stop, trainer.state.global_step))
        _finish_run(trainer, folder, data, spec)
    if stop.received:
        raise Preempted(f"{folder.path}: finished; {stop.received.name} stops what comes after it")


def _tell_notices(spec: PipelineSpec, data: Data, report: dict[str, Any]) -> None:
    """Print what a user should know of spec and data on stderr; ``report`` is the data's."""
    for line in (*advice_on(spec), *data.notices):
        tell_once(line)
    for name, what in OVERLAPS.items():
        if report[name]:
            tell_once(f"data: {report[name]} of {len(data.splits.validation)} validation examples {what}")


def _beginning_record(
    spec: PipelineSpec, folder: Folder, data: Data, report: dict[str, Any]
) -> dict[str, Any]:
    """Return what ``run.json`` holds from the beginning of a run; ``report`` is the data's."""
    record = {"data": report, **run_provenance(spec)}
    if data.store is not None:
        record["store"] = str(data.store.folder)
    record["pretraining_data"] = pretraining_report(folder.spec)
    kept = kept_layers_of(spec)
    if kept:
        record[KEPT_LAYERS] = kept
    return record


def _train_to_the_end(
    trainer: KavaTrainer, distiller: Distiller, spec: PipelineSpec, folder: Folder, data: Data
) -> None:
    """Train all steps that are left; a checkpoint of the last step is only loaded."""
    resume = _recover_checkpoint(folder)
    if resume is not None and checkpoint.step_of(resume) >= spec.train.steps:
        load_weights(distiller, resume)
        trainer.load_ledger(resume)
        trainer.state = TrainerState.load_from_json(str(resume / TRAINER_STATE_NAME))
        return
    reset_peak_memory()
    if resume is None:
        calibrate_components(distiller, data, spec, trainer.args.device)
        set_loss_weights(distiller, data, spec, trainer.args.device)
        trainer.evaluator.begin(distiller, trainer.args.device)
        if is_main():
            keep_first_weights(distiller.student, folder.first_weights)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))


def _recover_checkpoint(folder: Folder) -> Path | None:
    """Return the checkpoint to go on from, chosen by one process for all; report damage on stderr."""
    chosen: list[Path | None] = [None]
    if is_main():
        chosen[0], damaged = checkpoint.recover_newest(folder.checkpoints)
        for line in damaged:
            print(line, file=sys.stderr)
        if damaged and chosen[0] is None:
            print(f"{folder.path}: no intact checkpoint is left; the run begins anew", file=sys.stderr)
    return broadcast_object_list(chosen)[0]


def _describe_stop(folder: Folder, stop: StopOnSignal, step: int) -> str:
    name = stop.received.name if stop.received else "a signal"
    return f"{folder.path}: stopped by {name} at step {step}, saved; run the same command again to go on"


def _make_trainer(
    spec: PipelineSpec, folder: Folder, data: Data, distiller: Distiller, stop: StopOnSignal
) -> KavaTrainer:
    evaluator = Evaluator(
        data.validation_items,
        data.plain_collator,
        data.tokenizer,
        data.judge,
        spec.evaluate,
        folder,
        CollapseMonitor(folder.before_training),
    )
    ledger = Ledger(step_passes(spec.student))
    distiller.attach_ledger(ledger)
    collate: Any = PlansTime(data.collator, distiller.pipeline, distiller.hidden)
    own_texts = None
    if spec.online is not None:
        limits: dict[str | None, int | None] = {}
        for name, config in distiller.model_configs().items():
            limits[name] = max_positions(config)
        limits[None] = limits[STUDENT]
        own_texts = OwnTexts(spec.online, data.collator, collate, seed=folder.seed, position_limits=limits)
        collate = CollatorWithExamples(collate)
    trainer = KavaTrainer(
        model=distiller,
        args=training_arguments(spec, folder, examples=len(data.train_items)),
        train_dataset=data.train_items,
        eval_dataset=data.validation_items,
        data_collator=collate,
        callbacks=[
            EvaluateAtEnd(),
            ScheduleWeights(distiller),
            MetricsFile(folder.metrics),
            stop,
            ShowProgress(f"{spec.name}/{folder.variant} seed {folder.seed}"),
        ],
        evaluator=evaluator,
        ledger=ledger,
        own_texts=own_texts,
        keep=spec.train.keep_checkpoints,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _finish_run(trainer: KavaTrainer, folder: Folder, data: Data, spec: PipelineSpec) -> None:
    """Save the student and the run's record."""
    distiller = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    peak_of_each_process = gather_object([trainer.ledger.peak()])
    counts = gather_object([trainer.ledger.state()])
    if is_main():
        # Here the student is whole, sharded or not.
        outputs = outputs_of_student(distiller, data)
        moved = share_of_moved_weights(distiller.student, folder.first_weights)
        save_student(distiller.student, data.tokenizer, folder.student, distiller.latents)
        check_saved_student(folder.student, outputs, distiller, data)
        _save_attention(distiller, folder, data, spec)
        compute = recorded_compute(
            spec,
            distiller.model_configs(),
            counts,
            stored=None if data.store is None else store_counts(spec, data, distiller.pipeline),
            metrics=folder.metrics,
            memory=max(peak_of_each_process),
        )
        results = {"steps": trainer.state.global_step, **_last_evaluation(trainer.state)}
        folder.finish(results, {"compute": compute, "moved_weights": moved})
    trainer.accelerator.wait_for_everyone()


def _save_attention(distiller: Distiller, folder: Folder, data: Data, spec: PipelineSpec) -> None:
    """Save what the models attend to in one validation example.

    Latent tokens are left out, as they are no text, and so are sharded teachers, which all processes would
    have to run.
    """
    if spec.trajectory == "latent" or spec.student.encoder:
        return
    models: dict[str, Any] = {"student": distiller.student}
    whole = {teacher.name for teacher in spec.teachers if teacher.placement != SHARDED}
    for teacher in distiller.teachers:
        if teacher.name in whole and not isinstance(teacher, TokenTeacher):
            models[teacher.name] = teacher.model
    tokenizers = {"student": data.tokenizer, **data.teacher_tokenizers}
    # Texts of all sides, also where training reads a store and this collator brings targets instead.
    batch = Collator.__call__(data.plain_collator, [data.validation_items[0]])
    with torch.compiler.set_stance("force_eager"):
        save_attention_maps(folder, models, batch, tokenizers)


def _last_evaluation(state: TrainerState) -> dict[str, float]:
    """Return the metrics of the last evaluation, which is that of the last step."""
    last = [line for line in state.log_history if "eval_ce" in line][-1]
    return {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
