"""What an experiment declared, written down before its first run: ``experiment.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kava_core.errors import CheckpointError
from kava_core.json_files import write_json
from kava_core.runs.folder import Folder
from kava_core.specfile.sections.compare import CompareSpec

FILE = "experiment.json"


def declare(folder: Path, compare: CompareSpec, treatment: str, runs: Sequence[Folder]) -> None:
    """Write, or bring up to date, what will be run and compared.

    What was declared before stays beside it, with how many of its runs were complete, and so could have been
    seen, when comparisons, variants, their settings or seeds were changed.
    """
    now = {
        "compare": compare.model_dump(mode="json"),
        "treatment": treatment,
        "runs": [{"variant": r.variant, "seed": r.seed, "folder": r.path.name} for r in runs],
    }
    before = read(folder) if (folder / FILE).exists() else {}
    changed = [name for name, value in now.items() if before.get(name) != value]
    earlier = before.get("earlier", [])
    if before and changed and (complete := _complete(folder, before["runs"])):
        earlier = [*earlier, {n: before[n] for n in (*now, "declared")} | {"complete": complete}]
    folder.mkdir(parents=True, exist_ok=True)
    when = datetime.now(UTC).isoformat(timespec="seconds") if changed else before["declared"]
    write_json(folder / FILE, now | {"declared": when, "earlier": earlier})


def _complete(folder: Path, runs: Sequence[Mapping[str, Any]]) -> int:
    return sum(Folder(folder / run["folder"]).state() == "complete" for run in runs)


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
