"""Write the trained student as a plain Hugging Face folder, with a card that holds the exact spec."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from kava_core.errors import CheckpointError, KavaError
from kava_core.runs import checkpoint
from kava_core.runs.folder import Folder, refuse_inside_run
from kava_core.train.save_student import LOADING_NOTES, copy_error_text, loading_class

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


def export_student(path: Path, target: Path) -> None:
    """Copy a finished run's student to ``target`` with a model card.

    Raises:
        SpecError: ``path`` is no finished run, or ``target`` is inside a run.
        CheckpointError: the run directory is damaged, its student missing or altered.
        KavaError: ``target`` exists and is not an empty folder, or cannot be written.
    """
    run = Folder(path)
    record = run.finished_record()
    run.verify_student()
    card = _model_card(run, record)
    refuse_inside_run(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise KavaError(f"{target}: exists already; give a new folder")
    staging = target.with_name(f"{target.name}.{os.getpid()}.staging")
    try:
        shutil.copytree(run.student, staging, ignore=shutil.ignore_patterns(checkpoint.MANIFEST))
        (staging / "README.md").write_text(card, encoding="utf-8")
        if target.exists():
            target.rmdir()
        staging.rename(target)
    except OSError as error:
        raise KavaError(f"{target}: cannot be written: {copy_error_text(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _model_card(run: Folder, record: dict[str, Any]) -> str:
    results = record["results"]
    rows = [f"| {name} | {value:.6g} |" for name, value in results.items() if name != "steps"]
    class_name = loading_class(run.student)
    return CARD.format(
        use=f"Load it with `{class_name}.from_pretrained`; {LOADING_NOTES[class_name]}.",
        name=record["name"],
        version=record["versions"].get("kava", "from source"),
        variant=record["variant"],
        seed=record["seed"],
        steps=results["steps"],
        rows="\n".join(rows),
        data=json.dumps(record["data"]),
        spec=_read_spec_text(run.spec_file),
    )


def _read_spec_text(file: Path) -> str:
    """Read a spec as it was written; CheckpointError if it is no JSON."""
    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: unreadable: {error}") from error
    return text
