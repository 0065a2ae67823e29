"""``kava eval``: greedy answers to every example of a file, judged one by one, with what they can prove."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kava_core.data.dataset import split_nearly_equal
from kava_core.data.examples import Example, is_correct, render_example
from kava_core.data.jsonl import read_examples
from kava_core.data.splits import Splits, load_splits, split_hash
from kava_core.errors import SpecError
from kava_core.jobs.evaluate.student import Student
from kava_core.json_files import write_json
from kava_core.models.config import check_answer_fits
from kava_core.paths import file_hash, make_folder
from kava_core.runs.record import environment
from kava_core.train.validation.answers import Answers

LEVEL = 1.959963984540054
"""Of a 95 % interval, in standard deviations."""


def examples_of(student: Student, file: Path | None, format: str, limit: int | None) -> list[Example]:
    """Those of a file, or the validation examples that the run itself was judged by.

    Raises:
        SpecError: the file is no such file; or the run's own data changed since it was trained.
    """
    if file is not None:
        return read_examples(file, format, limit, separator=student.spec.data.separator)
    splits = load_splits(student.spec.data, root=Path.cwd())
    if not splits.same_as(student.record["data"]):
        raise SpecError(f"{student.run}: the data changed since this run ended")
    return list(splits.validation[: student.spec.evaluate.examples][:limit])


@torch.no_grad()
def judged(
    student: Student, examples: Sequence[Example], *, batch_size: int, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """One line for every example, in batches: what it was, what was written, whether that is right.

    ``sha256`` names the prompt as the student read it, so that lines of two evaluations can be paired.
    """
    template = student.spec.data.template
    answers = Answers(student.collator, student.tokenizer, max_new_tokens)
    device = next(student.distiller.parameters()).device
    for some in split_nearly_equal(examples, batch_size):
        texts, _ = answers(student.distiller, some, device)
        for example, text in zip(some, texts, strict=True):
            prompt = render_example(example, template).prompt
            yield {
                "sha256": hashlib.sha256(prompt.encode("utf-8")).hexdigest(),
                "prompt": prompt,
                "gold": example.answer,
                "wrote": text,
                "correct": is_correct(text, example, template),
            }


def check_room(student: Student, examples: Sequence[Example], max_new_tokens: int) -> None:
    """SpecError where the longest prompt and its answer do not fit into the student's positions."""
    prompts, _ = student.collator.prompts(examples)
    latents = student.distiller.latents
    mask = prompts["attention_mask" if latents is None else "before_mask"]
    longest = int(mask.sum(1).max()) + (0 if latents is None else latents.count + 1)
    config: Any = student.distiller.student.config
    check_answer_fits(config, longest, max_new_tokens, field="--max-new-tokens")


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (JASA 22, 1927): over examples, of this one student."""
    share, square = right / count, LEVEL**2 / count
    middle = (share + square / 2) / (1 + square)
    half = LEVEL / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return middle - half, middle + half


def summary(
    student: Student, examples: Sequence[Example], lines: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> dict[str, Any]:
    """The numbers, and everything they depend on."""
    right = sum(line["correct"] for line in lines)
    low, high = wilson(right, len(lines))
    weights = sorted(student.run.student.glob("*.safetensors"))
    return {
        "exact_match": right / len(lines),
        "correct": right,
        "examples": len(lines),
        "wilson_95": [low, high],
        "settings": settings,
        "data": {"sha256": split_hash(examples), **_overlap(student, examples)},
        "student": {file.name: file_hash(file) for file in weights},
        "run": {name: student.record[name] for name in ("name", "variant", "seed", "spec_digest")},
        **environment(),
    }


def _overlap(student: Student, examples: Sequence[Example]) -> dict[str, Any]:
    """How many of the examples the student has met in training; why that is not known, where it is not."""
    try:
        splits = load_splits(student.spec.data, root=Path.cwd())
    except SpecError as error:
        return {"training_data": f"not looked at: {error}"}
    if not splits.same_as(student.record["data"]):
        return {"training_data": "not looked at: the files are no longer those it was trained on"}
    found = Splits(splits.train, examples).report()
    return {name: found[name] for name in ("duplicates_across", "contaminated")}


def write(folder: Path, lines: Sequence[dict[str, Any]], found: dict[str, Any]) -> int:
    """``answers.jsonl`` and ``result.json``; returns how often these examples had been judged here before."""
    make_folder(folder)
    before = 0
    if (folder / "result.json").exists():
        before = int(json.loads((folder / "result.json").read_text(encoding="utf-8")).get("times", 1))
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")
    write_json(folder / "result.json", found | {"times": before + 1})
    return before
