"""Folders as ``kava experiment`` leaves them, without training anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kava_core.specfile.sections.compare import CompareSpec

SPEC = {
    "name": "x",
    "student": {"frozen": False, "config": {"layers": 2}},
    "teachers": [{"name": "wide", "align": {"dim_projector": {"name": "calibrated", "method": "pca"}}}],
    "losses": [{"name": "relation", "weight": 1.0, "parts": ["values"]}],
    "train": {"steps": 40, "shuffle_teacher": False},
    "seeds": [0, 1],
    "variants": {},
}
SHA = {"train": "a" * 64, "validation": "b" * 64}
COMPUTE = {
    "student_tokens": 1000,
    "teacher_tokens": 2000,
    "flops": 3.0e9,
    "flops_of": {"student": 3.0e9},
    "seconds": 1.5,
    "peak_memory": 2**29,
}


def record(variant: str, seed: int, **changes: Any) -> dict[str, Any]:
    """A ``run.json``."""
    data = {name: {"examples": 8, "sha256": sha} for name, sha in SHA.items()}
    return {
        "name": "x",
        "variant": variant,
        "seed": seed,
        "spec_digest": f"digest of {variant}",
        "status": "complete",
        "data": data | {"duplicates_in_train": 0, "duplicates_across": 1, "contaminated": 2},
        "versions": {"kava": "0.1.0", "torch": "2.13.0"},
        "world_size": 1,
        "threads": 1,
        "device": "cpu",
        "python": "3.11.7",
        "compute": COMPUTE,
    } | changes


def write_run(
    folder: Path,
    variant: str,
    seed: int,
    curve: Sequence[Mapping[str, float]],
    *,
    samples: Sequence[Mapping[str, Any]] = (),
    correct: Sequence[int] | None = None,
    spec: Mapping[str, Any] = SPEC,
    **changes: Any,
) -> Path:
    """A run whose evaluations, every 20 steps, are ``curve``; the last one holds its results."""
    run = folder / f"run-{len(list(folder.glob('run-*')))}"
    run.mkdir(parents=True)
    results = {"steps": 20 * len(curve), **curve[-1]} if curve else {}
    whole = record(variant, seed, results=results) | changes
    lines = [
        {"step": 20 * step, "seconds": 1.0} | {f"eval_{name}": value for name, value in one.items()}
        for step, one in enumerate(curve, 1)
    ]
    _write(run / "run.json", whole)
    _write(run / "spec.json", spec)
    _lines(run / "metrics.jsonl", lines)
    if samples:
        _lines(run / "samples.jsonl", samples)
    if correct is not None:
        _write(run / "correct.json", correct)
    return run


def declare(folder: Path, compare: Mapping[str, Any], treatment: str, **changes: Any) -> None:
    """An ``experiment.json`` for the runs that lie in the folder."""
    runs = [json.loads((run / "run.json").read_text()) | {"folder": run.name} for run in _runs(folder)]
    declared = {
        "declared": "2026-11-22T01:00:00+00:00",
        "compare": CompareSpec.model_validate(compare).model_dump(mode="json"),
        "treatment": treatment,
        "runs": [{name: run[name] for name in ("variant", "seed", "folder")} for run in runs],
        "earlier": [],
    }
    _write(folder / "experiment.json", declared | changes)


def _runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("run-*"), key=lambda run: int(run.name.removeprefix("run-")))


def fail(run: Path, error: str) -> None:
    """Turn a run into one that failed."""
    found = json.loads((run / "run.json").read_text())
    _write(run / "run.json", found | {"status": "running"})
    _write(run / "failure.json", {"exit_code": 4, "error": error, "when": "2026-11-22"})


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def _lines(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def falling(end: float, **more: float) -> list[dict[str, float]]:
    """Two evaluations whose cross-entropy falls to ``end``; the rest stays."""
    return [{"ce": end + 1, "exact_match": 0.25, **more}, {"ce": end, "exact_match": 0.5, **more}]


HOSTILE = (
    "<script>document.title='hacked'</script>",
    "\"'><img src=x onerror=alert(1)>",
    "$\\frac{x$ & $y$",
    "_hidden",
    "=cmd|' /C calc'!A0",
    "\u202eright to left עברית 👩‍👩‍👧",
    "half \ud83d of a pair \x00\x1b[31m",
    "l" + "o" * 198 + "ng",
    "| a | b |\n# title [x](javascript:alert(1)) `c` *d* ~~e~~",
    "{{ 7 * 7 }} {% raw %}",
)


def hostile(folder: Path) -> Path:
    """An experiment in which everything that somebody else names tries to do harm."""
    treatment = HOSTILE[0]
    tasks = {f"weight/{name}@{HOSTILE[3]}": 0.5 for name in HOSTILE[:2]}
    for seed in range(2):
        for place, variant in enumerate((*HOSTILE, "no_kv")):
            teachers = {f"weight/{name}": 0.1 * place for name in HOSTILE}
            watched = {f"collapse/{name}/keys/rank": 1.0 + place + seed for name in HOSTILE}
            more = tasks if place < 2 else {}
            curve = falling(1.0 + 0.1 * place + 0.01 * seed * place, **teachers, **watched, **more)
            answers = [{"prompt": name, "gold": name, "wrote": name, "correct": True} for name in HOSTILE]
            write_run(folder, variant, seed, curve, samples=answers, device=HOSTILE[place % len(HOSTILE)])
    fail(write_run(folder, HOSTILE[1], 2, [], spec=SPEC | {HOSTILE[0]: HOSTILE[2]}), HOSTILE[0] + HOSTILE[2])
    declare(folder, {"metric": "ce", "controls": ["no_kv"]}, treatment)
    return folder
