"""``transformers.Trainer`` around the composite module: what kava changes, and why.

- the loss is divided by counts of the whole batch, over accumulation and processes;
- a non-finite loss or gradient stops the run before the weights are touched;
- checkpoints are complete or absent, and hold the student in Hugging Face's form;
- evaluation sums numerators and counts;
- a student that accelerate shards (FSDP2) is whole again for evaluation and once training has ended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from numpy.random import SeedSequence
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from kava_core.distill.distiller import Distiller
from kava_core.errors import CheckpointError, KavaError, NonFiniteError, SpecError
from kava_core.latent.curriculum import latents_at
from kava_core.models.fsdp import (
    average_gradients,
    check_launch,
    check_precision,
    copy_without_weights,
    fill_with_weights,
    gathered_tensor,
    gathered_weights,
    is_sharded,
    prepare_for_sharding,
)
from kava_core.models.ledger import Ledger
from kava_core.models.placement import check_even_evaluation
from kava_core.runs import checkpoint
from kava_core.train.own_texts import OwnTexts
from kava_core.train.validation.evaluate import Evaluator
from kava_core.train.weights import assert_finite_weights, load_weights, save_weights, under


class RunningMeans:
    """Means of the loss terms since the last log line; saved with every checkpoint, so no step is lost."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Take in the terms of a forward pass; they add up over the passes of a step."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()

    def take(self) -> dict[str, Tensor]:
        """The means, by name; begins anew."""
        means = {name: value / self.steps for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means

    def save(self, file: Path) -> None:
        """As JSON, in which float32 survives exactly."""
        sums = {name: value.item() for name, value in self.sums.items()}
        file.write_text(json.dumps({"steps": self.steps, "sums": sums}), encoding="utf-8")

    def load(self, file: Path, device: torch.device) -> None:
        """Go on from what ``save`` wrote; CheckpointError where there is nothing to read."""
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: unreadable: {error}") from error
        self.sums = {name: torch.tensor(value, device=device) for name, value in saved["sums"].items()}
        self.steps = saved["steps"]


def own_rates(pipeline: nn.Module, common: float) -> dict[Tensor, float]:
    """Every parameter with the ``learning_rate`` its module names, or the common one."""
    rates: dict[Tensor, float] = dict.fromkeys(pipeline.parameters(), common)
    for module in pipeline.modules():
        rate = getattr(module, "learning_rate", None)
        if isinstance(rate, int | float):
            rates |= dict.fromkeys(module.parameters(), float(rate))
    return rates


def split_group(optimizer: torch.optim.Optimizer, group: dict[str, Any], own: Mapping[Tensor, float]) -> None:
    """Move a group's parameters that are in ``own`` to a new group for each rate, without weight decay."""
    for rate in sorted({own[p] for p in group["params"] if p in own}):
        apart = [p for p in group["params"] if own.get(p) == rate]
        group["params"] = [p for p in group["params"] if own.get(p) != rate]
        optimizer.add_param_group({**group, "params": apart, "lr": rate, "weight_decay": 0.0})


class KavaTrainer(Trainer):
    """Trains a ``Distiller``.

    Args:
        evaluator: called with the distiller; gives the metrics of an evaluation.
        ledger: counts what training costs.
        own_texts: lets the student write a part of every batch; the collator is then a ``KeepsExamples``.
        keep: complete checkpoints kept.
        Everything else as in ``transformers.Trainer``.
    """

    def __init__(
        self,
        *args: Any,
        evaluator: Evaluator,
        ledger: Ledger,
        keep: int,
        own_texts: OwnTexts | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.evaluator = evaluator
        self.ledger = ledger
        self.own_texts = own_texts
        self.keep = keep
        self.loss_is_scaled_for_ga = True
        self._staging = False
        self._means = RunningMeans()
        self._bones: nn.Module | None = None
        self._check_launch()

    def _check_launch(self) -> None:
        args = self.args
        check_precision(
            os.environ.get("ACCELERATE_MIXED_PRECISION"),
            "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        )
        check_launch(self._plugin)
        if self._plugin is not None and self.distiller.latents is not None:
            raise SpecError("trajectory: latent: not with FSDP yet; use DDP or one process")
        if self._plugin is not None and self.own_texts is not None:
            raise SpecError("online: not with FSDP yet; use DDP or one process")
        if self._plugin is not None:
            self.distiller.to(args.device)

    @property
    def _plugin(self) -> Any:
        """accelerate's FSDP plugin; None where nothing is sharded."""
        return getattr(self.accelerator.state, "fsdp_plugin", None)

    @property
    def _autocast(self) -> torch.dtype | None:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(self.args.mixed_precision))

    @property
    def distiller(self) -> Distiller:
        """What is trained, seen through DDP."""
        found: Distiller = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return found

    # counting

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """The batches of a step; before they are counted, the student writes its part of them, and a
        curriculum's latent tokens are told their stage.

        Evaluation after the step, and after the last one, then looks at the stage that was trained.
        """
        latent = self.distiller.latent
        if latent is not None:
            latent.tokens.active = latents_at(self.state.global_step, latent.spec)
        if self.own_texts is not None:
            epoch_iterator = (self._with_own_texts(*entry) for entry in enumerate(epoch_iterator))
        return super().get_batch_samples(epoch_iterator, *args, **kwargs)

    def _with_own_texts(self, number: int, batch: Mapping[str, Any]) -> dict[str, Any]:
        assert self.own_texts is not None
        place = (self.state.global_step, number, self.args.process_index)
        return self.own_texts(batch, self.distiller, self.ledger, place, self._autocast)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """``counts`` over accumulation and processes."""
        items = (
            torch.stack([self.distiller.loss_denominators(batch) for batch in batch_samples])
            .sum(0)
            .to(device)
        )
        if self.args.world_size > 1:
            items = self.accelerator.gather(items[None]).sum(0)
        return items.clamp_min(1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one forward pass; DDP's mean over processes is undone, as counts are global."""
        distiller = self.distiller
        distiller.dropout_seed = self._dropout_seed()
        with self.ledger.counting():
            distiller.count_student_pass(self.ledger, inputs["student"])
            outputs = model(inputs["student"], inputs["teachers"], items=num_items_in_batch)
        self._means.add(outputs)
        loss = outputs["loss"] * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _dropout_seed(self) -> int:
        """By the run's seed, the forward pass and the process: the same in every variant of an experiment."""
        where = (self.args.seed, self.ledger.passes, self.args.process_index)
        return int(SeedSequence(where).generate_state(1)[0])

    # sharding

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        if self._plugin is not None:
            self._before_sharding(resume_from_checkpoint)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _before_sharding(self, resume_from_checkpoint: str | None) -> None:
        if resume_from_checkpoint is not None:
            load_weights(self.distiller, Path(resume_from_checkpoint))
        self._bones = copy_without_weights(self.distiller.student)
        prepare_for_sharding(self.distiller, self._plugin, device=self.args.device, autocast=self._autocast)
        # Else every process holds the whole gradient while it accumulates.
        self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; afterwards the first process holds the whole student, sharded or not."""
        check_even_evaluation(self.distiller, self.evaluator, self.accelerator.num_processes)
        ended = super().train(*args, **kwargs)
        if self._bones is not None:
            state = self._gathered_state()
            if self.args.should_save:
                self.distiller.student = fill_with_weights(self._bones, under(state, "student."))
        return ended

    # optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW; what aligns and routes does not decay, and may have a ``learning_rate`` of its own."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        distiller = self.distiller
        own = own_rates(distiller.pipeline, self.args.learning_rate)
        for group in list(optimizer.param_groups):
            split_group(optimizer, group, own)
        if self._plugin is not None:  # torch cannot load the sharded state of an empty group
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # stopping on NaN

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if self._plugin is not None:
            average_gradients(self.distiller.pipeline)
        norm = gathered_tensor(super()._clip_grad_norm(model))
        self._means.steps += 1
        finite = torch.isfinite(self._means.sums["loss"])
        if not self.args.fp16:  # with fp16 an infinite gradient makes the scaler skip the step
            finite = finite & torch.isfinite(torch.as_tensor(norm, device=finite.device))
        if not finite:
            raise NonFiniteError(self._describe_non_finite(norm))
        return norm

    def _describe_non_finite(self, norm: Tensor) -> str:
        terms = {name: value for name, value in self._means.sums.items() if name != "loss"}
        bad = [name for name, value in terms.items() if not torch.isfinite(value)]
        what = f"{', '.join(bad)} not finite" if bad else f"gradient norm is {float(norm)}"
        return (
            f"step {self.state.global_step + 1}: {what}; stopped before the update, nothing saved. "
            "Lower the learning rate, or run with --check-shapes to see where it begins"
        )

    # logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every loss term since the last line."""
        if "loss" in logs and self._means.steps:
            means = self._means.take()
            terms = torch.stack(list(means.values()))
            if self.args.world_size > 1:
                terms = self.accelerator.reduce(terms, "sum")
            logs |= dict(zip(means, terms.tolist(), strict=True))
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated here: ``kava plan`` counts a step exactly."""
        return 0

    # evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validation metrics; see ``kava_core.train.validation.evaluate``."""
        with self._whole_student():
            found = self.evaluator(self.distiller)
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextmanager
    def _whole_student(self) -> Iterator[None]:
        """Without a call to other processes; a sharded student is gathered in autocast's precision."""
        if self._plugin is None:
            yield
            return
        sharded = self._plugin.mixed_precision_policy is not None
        autocast = torch.autocast(self.args.device.type, self._autocast, enabled=sharded)
        with gathered_weights(self.distiller, reshard=self._plugin.reshard_after_forward), autocast:
            yield

    # checkpoints

    def _get_output_dir(self, trial: Any = None) -> str:
        folder = Path(super()._get_output_dir(trial))
        return str(folder / checkpoint.STAGING if self._staging else folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes into a staging folder; the rename that ends it makes the checkpoint exist.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
            KavaError: it could not be written; the checkpoints before it are untouched.
        """
        assert self.model is not None
        assert_finite_weights(self.model, f"step {self.state.global_step}")
        folder = self.checkpoints
        if self.args.should_save:
            checkpoint.clear_leftovers(folder)
        self.accelerator.wait_for_everyone()
        try:
            staged = self._stage(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoint.seal(staged, folder / staged.name)
                checkpoint.keep_newest(folder, self.keep)
                checkpoint.clear_leftovers(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            checkpoint.clear_leftovers(folder)
            raise KavaError(self._describe_unwritten(error)) from error
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()

    def _stage(self, model: nn.Module, trial: Any) -> Path:
        self._staging = True
        super()._save_checkpoint(model, trial)
        staged = checkpoint.path_of_step(Path(self._get_output_dir()), self.state.global_step)
        self._means.save(staged / self._of_process("means"))
        self.ledger.save(staged / self._of_process("ledger"))
        return staged

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return Path(str(self.args.output_dir))

    def _of_process(self, name: str) -> str:
        return f"{name}_{self.args.process_index}.json"

    def _describe_unwritten(self, error: Exception) -> str:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        where = checkpoint.path_of_step(self.checkpoints, self.state.global_step)
        return f"{where}: cannot be written: {said}; earlier checkpoints are untouched. Is the disk full?"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Always whole: a sharded student is gathered on the first process."""
        if self._plugin is None:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir, self._gathered_state())

    def _gathered_state(self) -> dict[str, Tensor]:
        """On the first process everything, weights that several modules share once; elsewhere nothing."""
        state = self.accelerator.get_state_dict(self.model)
        every, once = (
            {n for n, _ in self.distiller.named_parameters(remove_duplicate=d)} for d in (False, True)
        )
        return {name: tensor for name, tensor in state.items() if name not in every - once}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            save_weights(self.distiller, Path(output_dir or self.checkpoints), state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Without accelerate's own copy of the weights, which nobody would read."""
        if self._plugin is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_fsdp_optimizer(self._plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """What is sharded by now was loaded before."""
        distiller = self.accelerator.unwrap_model(model or self.model)
        if not is_sharded(distiller):
            load_weights(distiller, Path(resume_from_checkpoint))
        self._means.load(Path(resume_from_checkpoint) / self._of_process("means"), self.args.device)
        self.load_ledger(Path(resume_from_checkpoint))

    def load_ledger(self, saved: Path) -> None:
        """Go on counting from a checkpoint."""
        self.ledger.load(saved / self._of_process("ledger"))
