"""Write the examples as a task of lm-evaluation-harness, which judges an exported student without kava."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kava_core.data.examples import Example, render_example
from kava_core.errors import SpecError
from kava_core.files import make_folder
from kava_core.jobs.evaluate.answering_student import AnsweringStudent

NUMBER = r"([-+]?\$?[0-9][0-9,]*(?:\.[0-9]+)?)"
IGNORED = [",", r"\$", r"^\+", r"\.0+$"]
"""What two equal numbers may differ in."""


def write_harness_task(
    folder: Path, student: AnsweringStudent, examples: Sequence[Example], max_new_tokens: int
) -> str:
    """Write ``items.jsonl`` and ``task.yaml``; return the task's name.

    Prompts are written as the student reads them; an answer is the number behind the template's marker.

    Raises:
        SpecError: the student thinks in latent tokens, which the harness would leave out; or an answer is no
            number.
    """
    if student.spec.trajectory == "latent":
        raise SpecError(f"{student.run}: thinks in latent tokens, which lm-evaluation-harness leaves out")
    for example in examples:
        if not re.fullmatch(NUMBER, example.answer):
            raise SpecError(
                f"--lm-eval: the answer {example.answer!r} is no number, and the task looks for numbers"
            )
    make_folder(folder)
    template = student.spec.data.template
    lines = []
    for example in examples:
        item = {"prompt": render_example(example, template).prompt.text, "answer": example.answer}
        lines.append(json.dumps(item, ensure_ascii=False) + "\n")
    file = folder / "items.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    name = "kava_" + re.sub(r"\W", "_", student.spec.name)
    fields = _task_fields(name, file.resolve(), template.answer, max_new_tokens)
    (folder / "task.yaml").write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return name


def _task_fields(name: str, file: Path, answer_template: str, max_new_tokens: int) -> dict[str, Any]:
    marker = answer_template.partition("{answer}")[0].strip()
    find_number = {"function": "regex", "regex_pattern": re.escape(marker) + r"\s*" + NUMBER}
    exact_match = {
        "metric": "exact_match",
        "aggregation": "mean",
        "higher_is_better": True,
        "regexes_to_ignore": IGNORED,
    }
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens},
        "filter_list": [{"name": "marker", "filter": [find_number, {"function": "take_first"}]}],
        "metric_list": [exact_match],
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
