"""Write the examples as a task of lm-evaluation-harness, which judges an exported student without kava."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kava_core.data import answers
from kava_core.data.encoding.answer_judge import first_altered_text
from kava_core.data.encoding.first_texts import alteration
from kava_core.data.encoding.tokenize import special_numbers
from kava_core.data.examples import Example, answer_frame, render_example
from kava_core.errors import SpecError
from kava_core.files import make_folder
from kava_core.jobs.evaluate.answering_student import AnsweringStudent
from kava_core.specfile.sections.data import Template

JUDGE = "judge.py"
"""File of the rules that answers are judged by, beside the task."""

PROCESS_RESULTS = '''

MARKER, BEHIND = {marker!r}, {behind!r}
"""What the template has before and behind an answer."""


def process_results(doc, results):
    """Return 1 for a right answer, as ``kava eval`` does."""
    return {{"exact_match": float(is_right_answer(results[0], doc["answer"], MARKER, BEHIND))}}
'''


def write_harness_task(
    folder: Path, student: AnsweringStudent, examples: Sequence[Example], max_new_tokens: int
) -> str:
    """Write ``items.jsonl``, ``task.yaml`` and ``judge.py``; return the task's name.

    Prompts are written as the student reads them. ``judge.py`` is a copy of ``kava_core.data.answers``, so
    that the harness judges by the same rules.

    Raises:
        SpecError: the student thinks in latent tokens, which the harness would leave out; its marker is a
        special
            token, which the harness does not show; or its tokenizer alters texts.
    """
    _refuse_what_the_harness_cannot_see(student, examples)
    make_folder(folder)
    template = student.spec.data.template
    lines = []
    for example in examples:
        item = {"prompt": render_example(example, template).prompt_part.text, "answer": example.answer}
        lines.append(json.dumps(item, ensure_ascii=False) + "\n")
    file = folder / "items.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    name = "kava_" + re.sub(r"\W", "_", student.spec.name)
    (folder / JUDGE).write_text(_judge_source(template), encoding="utf-8")
    fields = _task_fields(name, file.resolve(), max_new_tokens)
    (folder / "task.yaml").write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return name


def _refuse_what_the_harness_cannot_see(student: AnsweringStudent, examples: Sequence[Example]) -> None:
    template = student.spec.data.template
    if student.spec.trajectory == "latent":
        raise SpecError(f"{student.run}: thinks in latent tokens, which lm-evaluation-harness leaves out")
    marker, _ = answer_frame(template)
    special = special_numbers(student.tokenizer)
    for token in student.tokenizer.convert_ids_to_tokens(sorted(special)):
        if token in marker:
            raise SpecError(
                f"--lm-eval: the marker {marker!r} holds the special token {token!r}, which "
                "lm-evaluation-harness removes from what a student wrote"
            )
    altered = first_altered_text(student.tokenizer, examples, template)
    if altered is not None:
        raise SpecError(f"--lm-eval: {alteration(altered)}: only kava compares such answers, token by token")


def _judge_source(template: Template) -> str:
    """Return the rules' own file, and the function that the harness calls."""
    marker, behind = answer_frame(template)
    return inspect.getsource(answers) + PROCESS_RESULTS.format(marker=marker, behind=behind)


def _task_fields(name: str, file: Path, max_new_tokens: int) -> dict[str, Any]:
    exact_match = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "process_results": Function(f"{JUDGE.removesuffix('.py')}.process_results"),
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens},
        "metric_list": [exact_match],
        "num_fewshot": 0,
        "metadata": {"version": 2.0},
    }


class Function(str):
    """Names a function of a file beside the task, which YAML writes with the tag of the harness."""


def _write_function(dumper: yaml.SafeDumper, function: Function) -> yaml.Node:
    return dumper.represent_scalar("!function", str(function))


yaml.SafeDumper.add_representer(Function, _write_function)
