"""What an experiment declared, written down before its first run: ``experiment.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kava_core.errors import CheckpointError
from kava_core.experiment.runs import Planned, state_of
from kava_core.spec.compare import CompareSpec
from kava_core.train.rundir import write_json

FILE = "experiment.json"


def declare(folder: Path, compare: CompareSpec, treatment: str, runs: Sequence[Planned]) -> None:
    """Write, or bring up to date, what will be run and compared.

    Comparisons that change once runs are complete are kept beside the new ones, with how many runs could
    have been seen by then.
    """
    before = read(folder) if (folder / FILE).exists() else {}
    asked = compare.model_dump(mode="json")
    earlier = before.get("earlier", [])
    if before and (before["compare"], before["treatment"]) != (asked, treatment):
        earlier = [*earlier, {name: before[name] for name in ("compare", "treatment", "declared")}]
        earlier[-1]["complete"] = sum(
            state_of(folder / run["folder"]) == "complete" for run in before["runs"]
        )
    same = before and len(earlier) == len(before.get("earlier", []))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / FILE,
        {
            "declared": before["declared"] if same else datetime.now(UTC).isoformat(timespec="seconds"),
            "compare": asked,
            "treatment": treatment,
            "runs": [{"variant": r.variant, "seed": r.seed, "folder": r.folder.name} for r in runs],
            "earlier": earlier,
        },
    )


def read(folder: Path) -> dict[str, Any]:
    """What ``declare`` wrote, checked; CheckpointError where there is nothing like it."""
    file = folder / FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        CompareSpec.model_validate(found["compare"])
        for run in found["runs"]:
            _ = (run["variant"], run["seed"], run["folder"])
        _ = (found["treatment"], found["declared"], found["earlier"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{file}: unreadable: {said}; kava experiment writes it") from error
    return dict(found)
