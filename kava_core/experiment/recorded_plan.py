"""Record what an experiment will run and compare, before its first run: ``experiment.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kava_core.errors import CheckpointError
from kava_core.files import write_json
from kava_core.runs.folder import Folder
from kava_core.specfile.sections.compare import CompareSpec

PLAN_FILE = "experiment.json"


def record_plan(folder: Path, compare: CompareSpec, treatment: str, runs: Sequence[Folder]) -> None:
    """Write what will be run and compared, or bring it up to date.

    When comparisons, variants, their settings or seeds were changed, the earlier plan stays beside the new
    one, with how many of its runs were complete, and so could have been seen.

    Args:
        folder: of the experiment.
        compare: the comparisons that are declared.
        treatment: the variant that the controls are compared with.
        runs: every run that is planned.
    """
    planned = [{"variant": run.variant, "seed": run.seed, "folder": run.path.name} for run in runs]
    plan = {"compare": compare.model_dump(mode="json"), "treatment": treatment, "runs": planned}
    before = read_plan(folder) if (folder / PLAN_FILE).exists() else {}
    changed = any(before.get(name) != value for name, value in plan.items())
    declared = datetime.now(UTC).isoformat(timespec="seconds") if changed else before["declared"]
    earlier = before.get("earlier", [])
    if before and changed:
        complete = _count_complete(folder, before["runs"])
        if complete:
            replaced = {name: before[name] for name in (*plan, "declared")}
            earlier = [*earlier, replaced | {"complete": complete}]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN_FILE, plan | {"declared": declared, "earlier": earlier})


def _count_complete(folder: Path, runs: Sequence[Mapping[str, Any]]) -> int:
    return sum(Folder(folder / run["folder"]).state() == "complete" for run in runs)


def read_plan(folder: Path) -> dict[str, Any]:
    """Return what ``record_plan`` wrote, checked.

    Raises:
        CheckpointError: there is nothing like it.
    """
    file = folder / PLAN_FILE
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        CompareSpec.model_validate(plan["compare"])
        for run in plan["runs"]:
            _ = (run["variant"], run["seed"], run["folder"])
        _ = (plan["treatment"], plan["declared"], plan["earlier"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{file}: unreadable: {reason}; kava experiment writes it") from error
    return dict(plan)
