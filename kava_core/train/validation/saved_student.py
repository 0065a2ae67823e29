"""Load the saved student again, and compare it with the one that was trained and evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTextEncoding

from kava_core.build.data import Data
from kava_core.distill.distiller import Distiller
from kava_core.errors import KavaError
from kava_core.kv.capture.evaluation_mode import evaluation_mode
from kava_core.latent.exported import load_latents
from kava_core.latent.student import final_pass, refine_latents
from kava_core.latent.tokens import LatentTokens
from kava_core.models.denoiser import Denoiser

COMPARED = 4
"""Validation examples that both students read."""
ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Largest difference that counts as rounding, by the dtype of the weights: root mean square over the outputs,
in
their standard deviations. Merging adapters rounds."""
ROUNDING_OF_HALF = 0.1
"""Likewise for weights of 16 bits, which a merge rounds to 3 digits."""


@torch.no_grad()
def outputs_of_student(distiller: Distiller, data: Data) -> Tensor:
    """Return what the trained student computes for the first validation examples, at real positions.

    Args:
        distiller: has the student, whole in this process.
        data: the run's.

    Returns:
        Logits, or an encoder's hidden states: ``position vocab`` or ``position hidden``, float32, on the CPU.
    """
    student = distiller.student
    model = student.encoder if isinstance(student, Denoiser) else student
    with evaluation_mode(distiller), torch.compiler.set_stance("force_eager"):
        return _outputs(model, distiller.latents, data, next(model.parameters()).device)


def check_saved_student(folder: Path, trained: Tensor, distiller: Distiller, data: Data) -> None:
    """Load a saved student as its users do, on the CPU, and compare its outputs with the trained one's.

    Args:
        folder: of the saved student.
        trained: ``outputs_of_student``.
        distiller: as it was trained.
        data: the run's.

    Raises:
        KavaError: it cannot be loaded, or its outputs differ by more than rounding.
    """
    difference = _relative_difference(_saved_outputs(folder, distiller, data), trained)
    dtype = next(distiller.student.parameters()).dtype
    if not difference <= ROUNDING.get(dtype, ROUNDING_OF_HALF):
        raise KavaError(
            f"{folder}: the saved student is not the trained one: loaded again, its outputs for validation "
            f"examples differ by {difference:.2g} of their standard deviation; {_likely_cause(distiller)}. "
            "The checkpoint of the last step holds what was trained"
        )


@torch.no_grad()
def _saved_outputs(folder: Path, distiller: Distiller, data: Data) -> Tensor:
    is_encoder = isinstance(distiller.student, Denoiser)
    kind: Any = AutoModelForTextEncoding if is_encoder else AutoModelForCausalLM
    try:
        model = kind.from_pretrained(folder).eval()
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise KavaError(f"{folder}: the saved student cannot be loaded again: {error}") from error
    latents = None if distiller.latents is None else load_latents(folder).eval()
    if latents is not None and distiller.latents is not None:
        latents.active = distiller.latents.active
    return _outputs(model, latents, data, torch.device("cpu"))


def _outputs(model: Any, latents: LatentTokens | None, data: Data, device: torch.device) -> Tensor:
    items = [data.validation_items[index] for index in range(min(COMPARED, len(data.validation_items)))]
    side = data.plain_collator.student_side([item.student for item in items])
    side = {name: value.to(device) for name, value in side.items() if isinstance(value, Tensor)}
    if latents is not None:
        thought = refine_latents(model, latents, side["before"], side["before_mask"])
        outputs = final_pass(model, thought, side)
        mask = torch.cat([thought.mask, side["after_mask"].bool()], 1)
    else:
        outputs = model(input_ids=side["input_ids"], attention_mask=side["attention_mask"])
        mask = side["attention_mask"].bool()
    computed = getattr(outputs, "logits", None)
    computed = outputs.last_hidden_state if computed is None else computed
    return computed[mask].float().cpu()


def _relative_difference(found: Tensor, trained: Tensor) -> float:
    if found.shape != trained.shape:
        return float("inf")
    return float((found - trained).square().mean().sqrt() / trained.std().clamp_min(1e-12))


def _likely_cause(distiller: Distiller) -> str:
    if hasattr(distiller.student, "merge_and_unload"):
        return "merging its adapters changed it (student.lora.targets may name shared weights)"
    return "weights were lost, renamed or shared when it was written"
