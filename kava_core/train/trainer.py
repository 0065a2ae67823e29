"""``transformers.Trainer`` around the composite module: what kava changes, and why.

- the loss is divided by counts of the whole batch, over accumulation and processes;
- a non-finite loss or gradient stops the run before the weights are touched;
- checkpoints are complete or absent, and hold the student in Hugging Face's form;
- evaluation sums numerators and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from kava_core.errors import NonFiniteError
from kava_core.train import checkpoint
from kava_core.train.distiller import IGNORED, Distiller
from kava_core.train.weights import assert_finite_weights, load_weights, save_weights


class KavaTrainer(Trainer):
    """Trains a ``Distiller``.

    Args:
        evaluator: called with the distiller; returns the metrics of an evaluation.
        keep: complete checkpoints kept.
        Everything else as in ``transformers.Trainer``.
    """

    def __init__(self, *args: Any, evaluator: Callable[[Distiller], dict[str, float]], keep: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.evaluator = evaluator
        self.keep = keep
        self.loss_is_scaled_for_ga = True
        self._staging = False
        self._terms: dict[str, Tensor] = {}
        self._summed_steps = 0

    # counting

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Labelled positions and real tokens of the student, over accumulation and processes."""
        sides = [batch["student"] for batch in batch_samples]
        labelled = sum(side["labels"][:, 1:].ne(IGNORED).sum() for side in sides)
        tokens = sum(side["attention_mask"].sum() for side in sides)
        items = torch.stack([torch.as_tensor(labelled), torch.as_tensor(tokens)]).to(device, torch.float32)
        if self.args.world_size > 1:
            items = self.accelerator.gather(items[None]).sum(0)
        return items.clamp_min(1)

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one forward pass; DDP's mean over processes is undone, as counts are global."""
        outputs = model(inputs["student"], inputs["teachers"], items=num_items_in_batch)
        for name, value in outputs.items():
            self._terms[name] = self._terms.get(name, 0) + value.detach()
        loss = outputs["loss"] * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # stopping on NaN

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = super()._clip_grad_norm(model)
        self._summed_steps += 1
        finite = torch.isfinite(self._terms["loss"])
        if not self.args.fp16:  # with fp16 an infinite gradient makes the scaler skip the step
            finite = finite & torch.isfinite(torch.as_tensor(norm, device=finite.device))
        if not finite:
            raise NonFiniteError(self._describe_non_finite(norm))
        return norm

    def _describe_non_finite(self, norm: Tensor) -> str:
        bad = [name for name, value in self._terms.items() if not torch.isfinite(value) and name != "loss"]
        what = f"{', '.join(bad)} not finite" if bad else f"gradient norm is {float(norm)}"
        return (
            f"step {self.state.global_step + 1}: {what}; stopped before the update, nothing saved. "
            "Lower the learning rate, or run with --check-shapes to see where it begins"
        )

    # logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every loss term since the last line."""
        if "loss" in logs and self._summed_steps:
            terms = torch.stack([value.float() for value in self._terms.values()]) / self._summed_steps
            if self.args.world_size > 1:
                terms = self.accelerator.reduce(terms, "sum")
            logs |= dict(zip(self._terms, terms.tolist(), strict=True))
            self._terms, self._summed_steps = {}, 0
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated here: ``kava plan`` counts a step exactly."""
        return 0

    # evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validation metrics; see ``kava_core.train.evaluate``."""
        distiller = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        metrics = {f"eval_{name}": value for name, value in self.evaluator(distiller).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # checkpoints

    def _get_output_dir(self, trial: Any = None) -> str:
        folder = Path(super()._get_output_dir(trial))
        return str(folder / "staging" if self._staging else folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes into a staging folder; the rename that ends it makes the checkpoint exist."""
        assert_finite_weights(self.model, f"step {self.state.global_step}")
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            staged = Path(self._get_output_dir()) / f"checkpoint-{self.state.global_step}"
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            checkpoint.seal(staged, folder / staged.name)
            checkpoint.prune(folder, self.keep)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            distiller = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            save_weights(distiller, Path(output_dir or self.args.output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))
