"""Score greedy answers to every example of a file one by one, and sum up what they can prove."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kava_core.data.dataset import split_nearly_equal
from kava_core.data.encoding.answer_judge import AnswerJudge
from kava_core.data.examples import Example, render_example
from kava_core.data.jsonl import read_examples
from kava_core.data.splits import Splits, load_splits, split_hash
from kava_core.errors import SpecError
from kava_core.files import file_hash, make_folder, write_json
from kava_core.jobs.evaluate.answering_student import AnsweringStudent
from kava_core.models.config import check_answer_fits
from kava_core.runs.record import environment
from kava_core.train.validation.answer_writer import AnswerWriter

QUANTILE_95 = 1.959963984540054
"""Half the width of a 95 % interval, in standard deviations."""


def load_examples(
    student: AnsweringStudent, file: Path | None, format: str, limit: int | None
) -> list[Example]:
    """Load the examples of a file, or the validation examples that the run itself was judged by.

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
def score_answers(
    student: AnsweringStudent, examples: Sequence[Example], *, batch_size: int, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield one line for every example: what it was, what was written, whether that is right.

    ``sha256`` names the prompt as the student read it, so that lines of two evaluations can be paired.
    """
    template = student.spec.data.template
    judge = AnswerJudge.of_examples(student.tokenizer, template, examples)
    write_answers = AnswerWriter(student.collator, student.tokenizer, judge, max_new_tokens)
    device = next(student.distiller.parameters()).device
    for batch in split_nearly_equal(examples, batch_size):
        answers, _ = write_answers(student.distiller, batch, device)
        for example, (text, correct) in zip(batch, answers, strict=True):
            prompt = render_example(example, template).prompt_part.text
            yield {
                "sha256": hashlib.sha256(prompt.encode("utf-8")).hexdigest(),
                "prompt": prompt,
                "gold": example.answer,
                "wrote": text,
                "correct": correct,
            }


def check_prompts_fit(student: AnsweringStudent, examples: Sequence[Example], max_new_tokens: int) -> None:
    """Refuse examples whose longest prompt and its answer do not fit into the student's positions.

    Raises:
        SpecError: they do not fit.
    """
    prompts, _ = student.collator.prompts(examples)
    latents = student.distiller.latents
    if latents is None:
        longest = int(prompts["attention_mask"].sum(1).max())
    else:
        # Behind the prompt come the latent tokens and the token that ends them.
        longest = int(prompts["before_mask"].sum(1).max()) + latents.count + 1
    config: Any = student.distiller.student.config
    check_answer_fits(config, longest, max_new_tokens, field="--max-new-tokens")


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, over examples, of this one student.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    share = right / count
    square = QUANTILE_95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = QUANTILE_95 / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return middle - half, middle + half


def summarise_scores(
    student: AnsweringStudent,
    examples: Sequence[Example],
    lines: Sequence[dict[str, Any]],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Return the scores, and everything they depend on."""
    right = sum(line["correct"] for line in lines)
    weights = sorted(student.run.student.glob("*.safetensors"))
    return {
        "exact_match": right / len(lines),
        "correct": right,
        "examples": len(lines),
        "wilson_95": list(wilson_interval(right, len(lines))),
        "settings": settings,
        "data": {"sha256": split_hash(examples), **_training_overlap(student, examples)},
        "student": {file.name: file_hash(file) for file in weights},
        "run": {name: student.record[name] for name in ("name", "variant", "seed", "spec_digest")},
        **environment(),
    }


def _training_overlap(student: AnsweringStudent, examples: Sequence[Example]) -> dict[str, Any]:
    """Count the examples the student has met in training, or return why that is not known."""
    try:
        splits = load_splits(student.spec.data, root=Path.cwd())
    except SpecError as error:
        return {"training_data": f"not looked at: {error}"}
    if not splits.same_as(student.record["data"]):
        return {"training_data": "not looked at: the files are no longer those it was trained on"}
    report = Splits(splits.train, examples).report()
    return {name: report[name] for name in ("duplicates_across", "contaminated")}


def write_result(folder: Path, lines: Sequence[dict[str, Any]], result: dict[str, Any]) -> int:
    """Write ``answers.jsonl`` and ``result.json``; return how often they had been written here before."""
    make_folder(folder)
    file = folder / "result.json"
    times_before = 0
    if file.exists():
        times_before = int(json.loads(file.read_text(encoding="utf-8")).get("times", 1))
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")
    write_json(file, result | {"times": times_before + 1})
    return times_before
