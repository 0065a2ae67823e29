"""Write the trained student as a plain transformers folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from kava_core.kv.capture.geometry import ENCODER
from kava_core.latent.exported import SHAPE, save_latents
from kava_core.latent.tokens import LatentTokens
from kava_core.models.denoiser import Denoiser
from kava_core.runs import checkpoint

TEXT, LATENT = "transformers.AutoModelForCausalLM", "kava_core.latent.exported.LatentStudent"


ENCODERS = "transformers.AutoModelForTextEncoding"


USES = {
    TEXT: "kava is not needed",
    ENCODERS: "kava is not needed",
    LATENT: "it thinks in latent tokens before it answers, which transformers alone would leave out",
}


def save_student(
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    latents: LatentTokens | None = None,
) -> None:
    """Weights (adapters merged, an encoder without its head), tokenizer and manifest; complete or absent.

    With ``latents`` their weights as well: ``kava_core.latent.exported.LatentStudent`` reads the folder.
    """
    if hasattr(student, "merge_and_unload"):
        student = student.merge_and_unload()
    student = student.encoder if isinstance(student, Denoiser) else student
    staging = folder.with_name(folder.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    student.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    if latents is not None:
        save_latents(latents, staging)
    checkpoint.seal(staging, folder)


def _reason(error: OSError) -> str:
    """One line; ``shutil.copytree`` raises a list of errors, of which the first is told."""
    if error.strerror is None and error.args and isinstance(error.args[0], list):
        return str(error.args[0][0][-1])
    return error.strerror or str(error)


def loader(student: Path) -> str:
    """The class that loads a saved student."""
    if (student / SHAPE).exists():
        return LATENT
    return (
        ENCODERS if json.loads((student / "config.json").read_text(encoding="utf-8")).get(ENCODER) else TEXT
    )
