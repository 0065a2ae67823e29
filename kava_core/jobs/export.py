"""The trained student as a plain Hugging Face folder, with a card that holds the exact spec."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from kava_core.errors import CheckpointError, KavaError
from kava_core.kv.capture.geometry import ENCODER
from kava_core.latent.exported import SHAPE, save_latents
from kava_core.latent.tokens import LatentTokens
from kava_core.runs import checkpoint
from kava_core.runs.finished import finished_record, verify_student
from kava_core.train.denoise import Denoiser

TEXT, LATENT = "transformers.AutoModelForCausalLM", "kava_core.latent.exported.LatentStudent"
ENCODERS = "transformers.AutoModelForTextEncoding"
USES = {
    TEXT: "kava is not needed",
    ENCODERS: "kava is not needed",
    LATENT: "it thinks in latent tokens before it answers, which transformers alone would leave out",
}
CARD = """---
library_name: transformers
tags: [kava, distillation]
---
# {name}

A student trained with kava {version}: variant `{variant}`, seed {seed}, {steps} steps.
{use}

| metric (validation) | value |
|---|---|
{rows}

Data: {data}

## Spec

```json
{spec}
```
"""


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


def export(run: Path, target: Path) -> None:
    """Copy a finished run's student to ``target`` with a model card.

    Raises:
        SpecError: ``run`` is no finished run.
        CheckpointError: the run directory is damaged, its student missing or altered.
        KavaError: ``target`` exists and is not an empty folder, or cannot be written.
    """
    record = finished_record(run)
    verify_student(run / "student")
    card = _card(run, record)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise KavaError(f"{target}: exists already; give a new folder")
    staging = target.with_name(f"{target.name}.{os.getpid()}.staging")
    try:
        shutil.copytree(run / "student", staging, ignore=shutil.ignore_patterns(checkpoint.MANIFEST))
        (staging / "README.md").write_text(card, encoding="utf-8")
        if target.exists():
            target.rmdir()
        staging.rename(target)
    except OSError as error:
        raise KavaError(f"{target}: cannot be written: {_reason(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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


def _card(run: Path, record: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {name} | {value:.6g} |" for name, value in record["results"].items() if name != "steps"
    )
    return CARD.format(
        use=f"Load it with `{loader(run / 'student')}.from_pretrained`; {USES[loader(run / 'student')]}.",
        name=record["name"],
        version=record["versions"].get("kava", "from source"),
        variant=record["variant"],
        seed=record["seed"],
        steps=record["results"]["steps"],
        rows=rows,
        data=json.dumps(record["data"]),
        spec=_spec(run / "spec.json"),
    )


def _spec(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: unreadable: {error}") from error
    return text
