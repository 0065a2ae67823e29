"""The trained student as a plain Hugging Face folder, with a card that holds the exact spec."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from kava_core.errors import KavaError, SpecError
from kava_core.train import checkpoint

CARD = """---
library_name: transformers
tags: [kava, distillation]
---
# {name}

A student trained with kava {version}: variant `{variant}`, seed {seed}, {steps} steps.
Load it with `transformers.AutoModelForCausalLM.from_pretrained`; kava is not needed.

| metric (validation) | value |
|---|---|
{rows}

Data: {data}

## Spec

```json
{spec}
```
"""


def save_student(student: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights (adapters merged) and tokenizer; the folder is complete or absent."""
    if hasattr(student, "merge_and_unload"):
        student = student.merge_and_unload()
    staging = folder.with_name(folder.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    student.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    checkpoint.flush(staging)
    checkpoint.discard(folder)
    staging.rename(folder)


def export(run: Path, target: Path) -> None:
    """Copy a finished run's student to ``target`` with a model card.

    Raises:
        SpecError: ``run`` is no finished run.
        KavaError: ``target`` exists and is not an empty folder.
    """
    record = _record(run)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise KavaError(f"{target}: exists already; give a new folder")
    staging = target.with_name(f"{target.name}.{os.getpid()}.staging")
    shutil.copytree(run / "student", staging)
    (staging / "README.md").write_text(_card(run, record), encoding="utf-8")
    if target.exists():
        target.rmdir()
    staging.rename(target)


def _record(run: Path) -> dict[str, Any]:
    file = run / "run.json"
    if not file.is_file():
        raise SpecError(f"{run}: not a run directory (no run.json)")
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if record.get("status") != "complete":
        raise SpecError(f"{run}: the run is not finished; train it to its end first")
    return record


def _card(run: Path, record: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {name} | {value:.6g} |" for name, value in record["results"].items() if name != "steps"
    )
    return CARD.format(
        name=record["name"],
        version=record["versions"].get("kava", "from source"),
        variant=record["variant"],
        seed=record["seed"],
        steps=record["results"]["steps"],
        rows=rows,
        data=json.dumps(record["data"]),
        spec=(run / "spec.json").read_text(encoding="utf-8"),
    )
