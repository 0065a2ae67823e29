"""Load a finished run's student so that it can answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from kava_core.build.distiller import make_latent
from kava_core.console import quiet
from kava_core.data.collate import Collator
from kava_core.distill.distiller import Distiller
from kava_core.errors import SpecError
from kava_core.latent.collate import LatentCollator
from kava_core.latent.exported import load_latents
from kava_core.models.student import load_student
from kava_core.runs.folder import Folder
from kava_core.runs.saved_models import trained_student
from kava_core.specfile.sections.pipeline import PipelineSpec


@dataclass(frozen=True)
class AnsweringStudent:
    """A student that can answer, and how its prompts are made."""

    run: Folder
    spec: PipelineSpec
    record: dict[str, Any]
    distiller: Distiller
    tokenizer: Any
    collator: Collator


def load_answering_student(path: Path) -> AnsweringStudent:
    """Load a finished run's student in evaluation mode, on a GPU if there is one.

    Raises:
        SpecError: the run is not finished.
        CheckpointError: its directory is damaged.
    """
    run = Folder(path)
    record, spec = run.finished_record(), run.spec
    if spec.student.encoder:
        raise SpecError(f"{run}: its student is an encoder, which writes no answers")
    run.verify_student()
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(run.student)
        student = load_student(trained_student(run), tokenizer, seed=0)
    latent = None
    collator = Collator(tokenizer, {}, spec.data.template)
    if spec.trajectory == "latent":
        spec_without_teachers = spec.model_copy(update={"codi": None, "teachers": ()})
        latent = make_latent(spec_without_teachers, student, seed=0)
        latent.tokens.load_state_dict(load_latents(run.student).state_dict())
        collator = LatentCollator(tokenizer, {}, spec.data.template, latent=spec.latent)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    distiller = Distiller(student, latent=latent).to(device).eval()
    return AnsweringStudent(run, spec, record, distiller, tokenizer, collator)
