"""One run: a resolved spec, a variant's name and a seed, from start or from where it stopped."""

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
from kava_core.build.layer_maps import with_measured_maps
from kava_core.build.provenance import run_provenance
from kava_core.build.stored import with_store
from kava_core.build.time_plans import PlansTime
from kava_core.console import quiet
from kava_core.costs.flops import step_passes
from kava_core.costs.recorded import compute, store_counts
from kava_core.data.collate import Collator
from kava_core.data.splits import load_splits
from kava_core.distill.distiller import Distiller
from kava_core.errors import Preempted, SpecError
from kava_core.models.config import max_positions
from kava_core.models.ledger import STUDENT, Ledger, reset_peak_memory
from kava_core.models.placement import SHARDED
from kava_core.models.student import compile_forward
from kava_core.processes import is_main, world_size
from kava_core.runs import checkpoint
from kava_core.runs.folder import Folder
from kava_core.specfile.questions import used_teachers
from kava_core.specfile.sections.models import ModelSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.arguments import arguments
from kava_core.train.before_training import calibrate, weigh
from kava_core.train.callbacks import (
    EndComplete,
    MetricsFile,
    ScheduleWeights,
    ShowProgress,
    StopOnSignal,
)
from kava_core.train.own_texts import KeepsExamples, OwnTexts
from kava_core.train.pretrain import pretraining_name, pretraining_report, pretraining_spec
from kava_core.train.save_student import save_student
from kava_core.train.trainer import KavaTrainer
from kava_core.train.validation.attention_maps import keep_attention
from kava_core.train.validation.collapse_monitor import CollapseMonitor
from kava_core.train.validation.evaluate import Evaluator
from kava_core.train.weights import load_weights

M = TypeVar("M", bound=ModelSpec)


@dataclass(frozen=True)
class Result:
    """A finished run."""

    variant: str
    seed: int
    folder: Path
    results: dict[str, Any]


def run(spec: PipelineSpec, *, variant: str, seed: int, wait: bool = False) -> Result:
    """Train, or resume, or skip what is already complete.

    With ``wait`` another run that holds the directory is waited for, and its result taken.

    Raises:
        SpecError, CheckpointError, NonFiniteError: exit codes 2, 5, 4.
        KavaError: another run holds the directory, or the disk is full.
        Preempted: stopped by a signal; everything is saved (exit code 75).
    """
    folder = Folder.planned(spec, variant, seed)
    with folder.lock(wait=wait) if is_main() else nullcontext():
        _meet()
        if folder.complete:
            _same_data(spec, folder)
        else:
            with _failure_noted(folder):
                _train(with_trained_models(spec), folder)
    return Result(variant, seed, folder.path, folder.record()["results"])


@contextmanager
def _failure_noted(folder: Folder) -> Iterator[None]:
    """What ends the run, other than a request to stop, is written down beside it."""
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


def _meet() -> None:
    """Wait for the process that holds the lock: from here on all find the directory in the same state."""
    if world_size() > 1:
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=30))
        state.wait_for_everyone()


def with_trained_models(spec: PipelineSpec) -> PipelineSpec:
    """The spec with every model to be pretrained replaced by its trained folder."""
    teachers = tuple(_trained(spec, teacher) for teacher in used_teachers(spec))
    return spec.model_copy(update={"teachers": teachers, "student": _trained(spec, spec.student)})


def _same_data(spec: PipelineSpec, folder: Folder) -> None:
    """SpecError where a finished run was trained on other examples than the spec's files hold now."""
    if not load_splits(spec.data, root=Path.cwd()).same_as(folder.record()["data"]):
        raise SpecError(f"{folder.path}: the data changed since this run ended; give the run another name")


def _trained(spec: PipelineSpec, model: M) -> M:
    """The model with its trained folder in place of its config."""
    if model.pretrain is None:
        return model
    plan = pretraining_spec(spec, model)
    result = run(plan, variant=pretraining_name(spec, model), seed=plan.seeds[0], wait=True)
    path = str(Folder(result.folder).student)
    return model.model_copy(update={"path": path, "tokenizer": path, "config": None, "pretrain": None})


def _train(spec: PipelineSpec, folder: Folder) -> None:
    with quiet():
        _train_quietly(spec, folder)


def _train_quietly(spec: PipelineSpec, folder: Folder) -> None:
    with StopOnSignal() as stop:
        spec, data = with_store(spec, make_data(spec, folder.spec.teachers), seed=folder.seed)
        if is_main():
            folder.check_data(data.report())
        spec = with_measured_maps(spec, folder.layer_maps, data, seed=folder.seed)
        if is_main():
            store = {} if data.store is None else {"store": str(data.store.folder)}
            learnt = {"pretraining_data": pretraining_report(folder.spec)}
            folder.begin({"data": data.report(), **run_provenance(spec), **store, **learnt})
        distiller = make_distiller(spec, data, seed=folder.seed)
        if spec.train.compile is not None:
            compile_forward(distiller.student, spec.train.compile)
        trainer = _trainer(spec, folder, data, distiller, stop)
        distiller.place_teachers(trainer.args.device, {t.name: t.placement for t in spec.teachers})
        resume = _recovered(folder)
        if resume is not None and checkpoint.step_of(resume) >= spec.train.steps:
            load_weights(distiller, resume)
            trainer.load_ledger(resume)
            trainer.state = TrainerState.load_from_json(str(resume / TRAINER_STATE_NAME))
        else:
            reset_peak_memory()
            if resume is None:
                calibrate(distiller, data, spec, trainer.args.device)
                weigh(distiller, data, spec, trainer.args.device)
                trainer.evaluator.begin(distiller, trainer.args.device)
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        if trainer.state.global_step < spec.train.steps:
            if is_main():
                folder.stop()
            raise Preempted(_stopped(folder, stop, trainer.state.global_step))
        _finish(trainer, folder, data, spec)
    if stop.received:
        raise Preempted(f"{folder.path}: finished; {stop.received.name} stops what comes after it")


def _recovered(folder: Folder) -> Path | None:
    """The checkpoint to go on from, chosen by one process for all; what is damaged is reported on stderr."""
    chosen: list[Path | None] = [None]
    if is_main():
        chosen[0], damaged = checkpoint.recover_newest(folder.checkpoints)
        for line in damaged:
            print(line, file=sys.stderr)
        if damaged and chosen[0] is None:
            print(f"{folder.path}: no intact checkpoint is left; the run begins anew", file=sys.stderr)
    return broadcast_object_list(chosen)[0]


def _stopped(folder: Folder, stop: StopOnSignal, step: int) -> str:
    name = stop.received.name if stop.received else "a signal"
    return f"{folder.path}: stopped by {name} at step {step}, saved; run the same command again to go on"


def _trainer(
    spec: PipelineSpec, folder: Folder, data: Data, distiller: Distiller, stop: StopOnSignal
) -> KavaTrainer:
    evaluator = Evaluator(
        data.validation_items,
        data.plain_collator,
        data.tokenizer,
        spec.data.template,
        spec.evaluate,
        folder,
        CollapseMonitor(folder.before_training),
    )
    ledger = Ledger(step_passes(spec.student))
    distiller.attach_ledger(ledger)
    collate: Any = PlansTime(data.collator, distiller.pipeline)
    own_texts = None
    if spec.online is not None:
        rooms = {name: max_positions(config) for name, config in distiller.model_configs().items()}
        how: dict[str, Any] = {"seed": folder.seed, "rooms": rooms | {None: rooms[STUDENT]}}
        own_texts = OwnTexts(spec.online, data.collator, collate, **how)
        collate = KeepsExamples(collate)
    trainer = KavaTrainer(
        model=distiller,
        args=arguments(spec, folder, examples=len(data.train_items)),
        train_dataset=data.train_items,
        eval_dataset=data.validation_items,
        data_collator=collate,
        callbacks=[
            EndComplete(),
            ScheduleWeights(distiller.pipeline),
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


def _finish(trainer: KavaTrainer, folder: Folder, data: Data, spec: PipelineSpec) -> None:
    distiller = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    ledger, memory = trainer.ledger, gather_object([trainer.ledger.peak()])
    counts = gather_object([ledger.state()])
    if is_main():
        save_student(distiller.student, data.tokenizer, folder.student, distiller.latents)
        _keep_attention(distiller, folder, data, spec)
        how: dict[str, Any] = {"metrics": folder.metrics, "memory": max(memory)}
        if data.store is not None:
            how["stored"] = store_counts(spec, data, distiller.pipeline)
        cost = compute(spec, distiller.model_configs(), counts, **how)
        results = {"steps": trainer.state.global_step, **_last_evaluation(trainer.state)}
        folder.finish(results, {"compute": cost})
    trainer.accelerator.wait_for_everyone()


def _keep_attention(distiller: Distiller, folder: Folder, data: Data, spec: PipelineSpec) -> None:
    """Not of latent tokens, which stand for no text, nor of teachers that all processes would have to run."""
    if spec.trajectory == "latent" or spec.student.encoder:
        return
    whole = {teacher.name for teacher in spec.teachers if teacher.placement != SHARDED}
    teachers = {t.name: t.model for t in distiller.teachers if t.name in whole}
    tokenizers = {"student": data.tokenizer, **data.teacher_tokenizers}
    # Texts of all sides, also where training reads a store and this collator brings targets instead.
    batch = Collator.__call__(data.plain_collator, [data.validation_items[0]])
    with torch.compiler.set_stance("force_eager"):
        keep_attention(folder, {"student": distiller.student, **teachers}, batch, tokenizers)


def _last_evaluation(state: TrainerState) -> dict[str, float]:
    """The metrics of the last evaluation, which is that of the last step."""
    last = [line for line in state.log_history if "eval_ce" in line][-1]
    return {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
