"""Write the trained student as a plain transformers folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from kava_core.errors import KavaError
from kava_core.kv.capture.geometry import ENCODER
from kava_core.latent.exported import SHAPE, save_latents
from kava_core.latent.tokens import LatentTokens
from kava_core.models.denoiser import Denoiser
from kava_core.runs import checkpoint

TEXT = "transformers.AutoModelForCausalLM"
LATENT = "kava_core.latent.exported.LatentStudent"
ENCODERS = "transformers.AutoModelForTextEncoding"
"""Classes that load a saved student."""

LOADING_NOTES = {
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
    """Write weights (adapters merged, an encoder without its head), tokenizer and manifest.

    The folder is complete or absent.

    Args:
        student: the trained model.
        tokenizer: its tokenizer.
        folder: where they go.
        latents: latent tokens, whose weights are written as well; ``LatentStudent`` then reads the folder.

    Raises:
        KavaError: it cannot be written.
    """
    if hasattr(student, "merge_and_unload"):
        _untie_adapted_embeddings(student)
        student = student.merge_and_unload()
    student = student.encoder if isinstance(student, Denoiser) else student
    staging = folder.with_name(folder.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        student.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if latents is not None:
            save_latents(latents, staging)
        checkpoint.seal(staging, folder)
    except Exception as error:  # tokenizers raises bare Exception
        shutil.rmtree(staging, ignore_errors=True)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise KavaError(
            f"{folder}: cannot be written: {reason}; the last checkpoint holds what was trained: run the "
            "same command again. Is the disk full?"
        ) from error


def _untie_adapted_embeddings(student: Any) -> None:
    """Give the head weights of its own where embedding and head are one tensor and adapters change one of
    them.

    Merged into the shared tensor, what was trained for one of the two would change the other as well.
    """
    model = student.get_base_model()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return
    own_embedding, own_head = (getattr(layer, "base_layer", layer) for layer in (embedding, head))
    is_adapted = own_embedding is not embedding or own_head is not head
    if is_adapted and own_head.weight is own_embedding.weight:
        own_head.weight = nn.Parameter(own_head.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def copy_error_text(error: OSError) -> str:
    """Return one line on a failed copy; ``shutil.copytree`` raises a list of errors, the first counts."""
    if error.strerror is None and error.args and isinstance(error.args[0], list):
        return str(error.args[0][0][-1])
    return error.strerror or str(error)


def loading_class(student: Path) -> str:
    """Return the name of the class that loads a saved student."""
    if (student / SHAPE).exists():
        return LATENT
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    return ENCODERS if config.get(ENCODER) else TEXT
