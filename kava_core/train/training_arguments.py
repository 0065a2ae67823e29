"""Translate the spec's ``train`` section into transformers' arguments."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from transformers import TrainingArguments

from kava_core.errors import SpecError
from kava_core.processes import world_size
from kava_core.runs.folder import Folder
from kava_core.specfile.sections.pipeline import PipelineSpec


def training_arguments(spec: PipelineSpec, folder: Folder, *, examples: int) -> TrainingArguments:
    """Translate the spec's ``train`` section into transformers' arguments.

    Args:
        spec: the run's.
        folder: its directory.
        examples: how many training examples there are.

    Raises:
        SpecError: fp16 without a GPU, or a tracker that is not installed.
    """
    train = spec.train
    cuda = torch.cuda.is_available()
    if train.precision == "fp16" and not cuda:
        raise SpecError("train.precision: fp16 needs a CUDA device; on CPU use fp32 or bf16")
    _check_trackers_installed(train.trackers)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.path / "tensorboard")
    args = TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulate,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.clip,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        use_cpu=not cuda,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=spec.evaluate.every,
        save_strategy="steps",
        save_steps=train.save_every,
        seed=folder.seed,
        data_seed=folder.seed,
        dataloader_num_workers=train.workers,
        dataloader_pin_memory=cuda,
        dataloader_drop_last=examples >= train.batch_size * world_size(),
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        report_to=list(train.trackers),
        disable_tqdm=True,
    )
    args._n_gpu = min(args.n_gpu, 1)  # one process per GPU: torchrun, never nn.DataParallel
    return args


def _check_trackers_installed(trackers: tuple[str, ...]) -> None:
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise SpecError(f"train.trackers: {tracker} is not installed: pip install {tracker}")
