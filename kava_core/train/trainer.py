"""Train the composite module with ``transformers.Trainer``: what kava changes, and why.

- the loss is divided by counts of the whole batch, over accumulation and processes;
- a non-finite loss or gradient stops the run before the weights are touched;
- checkpoints are complete or absent, and hold the student in Hugging Face's form;
- evaluation sums numerators and counts;
- a student that accelerate shards (FSDP2) is whole again for evaluation and once training has ended.
"""

from __future__ import annotations

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
from transformers import Trainer, TrainerControl
from transformers.trainer import SCHEDULER_NAME

from kava_core.distill.distiller import Distiller
from kava_core.errors import KavaError, NonFiniteError, SpecError
from kava_core.kv.align.finite import raise_unread_faults
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
from kava_core.train.optimizer_groups import parameter_learning_rates, split_parameter_group
from kava_core.train.own_texts import OwnTexts
from kava_core.train.term_means import TermMeans
from kava_core.train.validation.evaluator import Evaluator
from kava_core.train.weights import (
    assert_finite_weights,
    entries_under,
    explain_unreadable_state,
    load_weights,
    save_weights,
)


class KavaTrainer(Trainer):
    """Trains a ``Distiller``.

    Args:
        evaluator: called with the distiller; returns the metrics of an evaluation.
        ledger: counts what training costs.
        own_texts: lets the student write a part of every batch; the collator is then a
            ``CollatorWithExamples``.
        keep: complete checkpoints kept.
        Everything else as in ``transformers.Trainer``.
    """

    control: TrainerControl

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
        self._term_means = TermMeans()
        self._empty_student: nn.Module | None = None
        self._check_launcher()

    def _check_launcher(self) -> None:
        """Refuse what accelerate's launcher asks for and kava does not do."""
        precision = "fp32"
        if self.args.bf16:
            precision = "bf16"
        elif self.args.fp16:
            precision = "fp16"
        check_precision(os.environ.get("ACCELERATE_MIXED_PRECISION"), precision)
        check_launch(self._fsdp_plugin)
        if self._fsdp_plugin is None:
            return
        if self.distiller.latents is not None:
            raise SpecError("trajectory: latent: not with FSDP yet; use DDP or one process")
        if self.own_texts is not None:
            raise SpecError("online: not with FSDP yet; use DDP or one process")
        self.distiller.to(self.args.device)

    @property
    def _fsdp_plugin(self) -> Any:
        """Return accelerate's FSDP plugin; None if nothing is sharded."""
        return getattr(self.accelerator.state, "fsdp_plugin", None)

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(self.args.mixed_precision))

    @property
    def distiller(self) -> Distiller:
        """Return what is trained, without the wrapper of DDP."""
        distiller: Distiller = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return distiller

    # counting

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """Return the batches of a step.

        Before they are counted, the student writes its part of them, and a curriculum's latent tokens are set
        to their stage. Evaluation after the step, and after the last one, then looks at the stage that was
        trained.
        """
        latent = self.distiller.latent
        if latent is not None:
            latent.tokens.active = latents_at(self.state.global_step, latent.spec)
        if self.own_texts is not None:
            epoch_iterator = self._replace_with_own_texts(epoch_iterator)
        return super().get_batch_samples(epoch_iterator, *args, **kwargs)

    def _replace_with_own_texts(self, batches: Iterator[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Let the student write its part of every batch when its turn comes."""
        assert self.own_texts is not None
        for number, batch in enumerate(batches):
            place = (self.state.global_step, number, self.args.process_index)
            yield self.own_texts(batch, self.distiller, self.ledger, place, self._autocast_dtype)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Return the loss denominators, summed over accumulation and processes."""
        counts = [self.distiller.loss_denominators(batch) for batch in batch_samples]
        items = torch.stack(counts).sum(0).to(device)
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
        """Return the loss of one forward pass; DDP's mean over processes is undone, as counts are global."""
        distiller = self.distiller
        distiller.dropout_seed = self._dropout_seed()
        with self.ledger.counting():
            distiller.count_student_pass(self.ledger, inputs["student"])
            outputs = model(inputs["student"], inputs["teachers"], items=num_items_in_batch)
        self._term_means.add_terms(outputs)
        loss = outputs["loss"] * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _dropout_seed(self) -> int:
        """Draw a seed from the run's seed, the forward pass and the process.

        It is the same in every variant of an experiment.
        """
        entropy = (self.args.seed, self.ledger.passes, self.args.process_index)
        return int(SeedSequence(entropy).generate_state(1)[0])

    # sharding

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        if self._fsdp_plugin is not None:
            self._prepare_sharding(resume_from_checkpoint)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _prepare_sharding(self, resume_from_checkpoint: str | None) -> None:
        if resume_from_checkpoint is not None:
            load_weights(self.distiller, Path(resume_from_checkpoint))
        self._empty_student = copy_without_weights(self.distiller.student)
        prepare_for_sharding(
            self.distiller, self._fsdp_plugin, device=self.args.device, autocast=self._autocast_dtype
        )
        # Else every process holds the whole gradient while it accumulates.
        self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as ``Trainer.train`` does.

        Afterwards the first process holds the whole student, sharded or not.
        """
        check_even_evaluation(self.distiller, self.evaluator, self.accelerator.num_processes)
        output = super().train(*args, **kwargs)
        if self._empty_student is not None:
            state = self._gathered_state()
            if self.args.should_save:
                self.distiller.student = fill_with_weights(
                    self._empty_student, entries_under(state, "student.")
                )
        return output

    # optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create AdamW; what aligns and routes does not decay, and may have its own ``learning_rate``."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        rates = parameter_learning_rates(self.distiller.beside_student, self.args.learning_rate)
        for group in list(optimizer.param_groups):
            split_parameter_group(optimizer, group, rates)
        if self._fsdp_plugin is not None:  # torch cannot load the sharded state of an empty group
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # stopping on NaN

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if self._fsdp_plugin is not None:
            average_gradients(self.distiller.beside_student)
        norm = gathered_tensor(super()._clip_grad_norm(model))
        self._term_means.steps += 1
        raise_unread_faults()
        finite = torch.isfinite(self._term_means.sums["loss"])
        if not self.args.fp16:  # with fp16 an infinite gradient makes the scaler skip the step
            finite = finite & torch.isfinite(torch.as_tensor(norm, device=finite.device))
        if not finite:
            raise NonFiniteError(self._describe_non_finite(norm))
        return norm

    def _describe_non_finite(self, norm: Tensor) -> str:
        terms = {name: value for name, value in self._term_means.sums.items() if name != "loss"}
        non_finite = [name for name, value in terms.items() if not torch.isfinite(value)]
        what = f"gradient norm is {float(norm)}"
        if non_finite:
            what = f"{', '.join(non_finite)} not finite"
        return (
            f"step {self.state.global_step + 1}: {what}; stopped before the update, nothing saved. "
            "Lower the learning rate, or run with --check-shapes to see where it begins"
        )

    # logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of every loss term since the last line."""
        if "loss" in logs and self._term_means.steps:
            means = self._term_means.take_means()
            terms = torch.stack(list(means.values()))
            if self.args.world_size > 1:
                terms = self.accelerator.reduce(terms, "sum")
            logs |= dict(zip(means, terms.tolist(), strict=True))
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: nothing is estimated here, as ``kava plan`` counts a step exactly."""
        return 0

    # evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure validation metrics; see ``kava_core.train.validation.evaluator``."""
        with self._whole_student():
            measured = self.evaluator(self.distiller)
        metrics = {f"eval_{name}": value for name, value in measured.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextmanager
    def _whole_student(self) -> Iterator[None]:
        """Make the student run without a call to other processes; a sharded one is gathered for that.

        It is gathered in autocast's precision.
        """
        if self._fsdp_plugin is None:
            yield
            return
        sharded = self._fsdp_plugin.mixed_precision_policy is not None
        autocast = torch.autocast(self.args.device.type, self._autocast_dtype, enabled=sharded)
        with gathered_weights(self.distiller, reshard=self._fsdp_plugin.reshard_after_forward), autocast:
            yield

    # checkpoints

    def _get_output_dir(self, trial: Any = None) -> str:
        folder = Path(super()._get_output_dir(trial))
        return str(folder / checkpoint.STAGING if self._staging else folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write into a staging folder; the rename that ends it makes the checkpoint exist.

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
            staged = self._save_staged(model, trial)
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

    def _save_staged(self, model: nn.Module, trial: Any) -> Path:
        """Write everything into the staging folder; return the checkpoint's folder there."""
        self._staging = True
        super()._save_checkpoint(model, trial)
        staged = checkpoint.path_of_step(Path(self._get_output_dir()), self.state.global_step)
        self._term_means.save(staged / self._process_file("means"))
        self.ledger.save(staged / self._process_file("ledger"))
        return staged

    @property
    def checkpoints(self) -> Path:
        """Return the folder of checkpoints."""
        return Path(str(self.args.output_dir))

    def _process_file(self, name: str) -> str:
        return f"{name}_{self.args.process_index}.json"

    def _describe_unwritten(self, error: Exception) -> str:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        where = checkpoint.path_of_step(self.checkpoints, self.state.global_step)
        return f"{where}: cannot be written: {reason}; earlier checkpoints are untouched. Is the disk full?"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole student; a sharded one is gathered on the first process."""
        if self._fsdp_plugin is None:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir, self._gathered_state())

    def _gathered_state(self) -> dict[str, Tensor]:
        """Gather everything on the first process; elsewhere return nothing.

        Weights that several modules share are there once.
        """
        state = self.accelerator.get_state_dict(self.model)
        with_duplicates = dict(self.distiller.named_parameters(remove_duplicate=False))
        without_duplicates = dict(self.distiller.named_parameters())
        duplicates = with_duplicates.keys() - without_duplicates.keys()
        return {name: tensor for name, tensor in state.items() if name not in duplicates}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            save_weights(self.distiller, Path(output_dir or self.checkpoints), state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save both, without accelerate's copy of a sharded student's weights, which nobody would read."""
        if self._fsdp_plugin is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_fsdp_optimizer(self._fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint; the weights of what is sharded by now were loaded before."""
        distiller = self.accelerator.unwrap_model(model or self.model)
        if not is_sharded(distiller):
            load_weights(distiller, Path(resume_from_checkpoint))
        self._term_means.load(Path(resume_from_checkpoint) / self._process_file("means"), self.args.device)
        self.load_ledger(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with explain_unreadable_state(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with explain_unreadable_state(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with explain_unreadable_state(checkpoint):
            super()._load_rng_state(checkpoint)

    def load_ledger(self, checkpoint_folder: Path) -> None:
        """Go on counting from a checkpoint."""
        self.ledger.load(checkpoint_folder / self._process_file("ledger"))
