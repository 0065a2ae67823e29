"""``kava eval``: formats, intervals, per-example lines, and the hand-over to lm-evaluation-harness."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from kava_core.data.examples import Example, is_correct
from kava_core.data.jsonl import read_examples
from kava_core.data.pal import example_from_pal
from kava_core.data.splits import load_splits
from kava_core.errors import SpecError
from kava_core.jobs.evaluate.answering_student import load_answering_student
from kava_core.jobs.evaluate.evaluate_run import AnswerOptions, evaluate_run
from kava_core.jobs.evaluate.harness_task import write_harness_task
from kava_core.jobs.evaluate.scored_answers import score_answers, wilson_interval
from kava_core.jobs.export import export_student
from kava_core.specfile.sections.data import JsonlData, Template
from kava_core.train.run import RunResult, run
from tests.support import tiny

HOW = AnswerOptions("fields", None, 5, 8)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A student that always answers 5, which is right for two thirds of the examples."""
    folder = tmp_path_factory.mktemp("ran")
    for name, count in (("train", 48), ("validation", 12)):
        examples = (
            {"prompt": f"{name[0]}{n}+{n % 7}", "reasoning": " so", "answer": "75"[n % 3 > 0]}
            for n in range(count)
        )
        (folder / name).write_text("".join(json.dumps(example) + "\n" for example in examples))
    spec = tiny.spec(
        folder,
        teachers=[],
        losses=[],
        train={"steps": 40, "batch_size": 16, "learning_rate": 1e-2, "log_every": 20, "save_every": 40},
        evaluate={"every": 40, "examples": 12, "max_new_tokens": 8},
    )
    data = JsonlData(
        train=str(folder / "train"),
        validation=str(folder / "validation"),
        template=Template(prompt="{prompt}?", reasoning="{reasoning}", answer=" #{answer}"),
    )
    return run(spec.model_copy(update={"data": data}), variant="main", seed=0)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_the_lines_are_those_the_last_evaluation_counted(ran: RunResult, tmp_path: Path) -> None:
    evaluate_run(ran.folder, None, tmp_path, None, HOW)
    found = [int(line["correct"]) for line in lines(tmp_path)]
    assert found == json.loads((ran.folder / "correct.json").read_text())
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["exact_match"] == pytest.approx(ran.results["exact_match"])
    assert 0 < result["correct"] < 12
    assert len({line["sha256"] for line in lines(tmp_path)}) == 12


def test_batches_change_no_answer(ran: RunResult) -> None:
    student = load_answering_student(ran.folder)
    examples = [Example(f"{a}+{b}", "", str((a + b) % 4)) for a in range(4) for b in (1, 2, 3)]
    whole, parts = (
        list(score_answers(student, examples, batch_size=size, max_new_tokens=6)) for size in (12, 5)
    )
    assert whole == parts


def test_latent_students_answer_too(tmp_path: Path) -> None:
    align = {"time_warper": {"name": "segment", "segments": ["reasoning"]}, "dim_projector": "linear"}
    spec = tiny.spec(
        tmp_path,
        teachers=[tiny.FIELDS["teachers"][1] | {"align": align}],
        trajectory="latent",
        latent={"count": 3, "passes": 2},
        train={"steps": 2, "save_every": 2},
    )
    result = run(spec, variant="main", seed=0)
    evaluate_run(result.folder, None, tmp_path / "out", None, HOW)
    found = [int(line["correct"]) for line in lines(tmp_path / "out")]
    assert found[:8] == json.loads((result.folder / "correct.json").read_text())
    with pytest.raises(SpecError, match="thinks in latent tokens, which lm-evaluation-harness leaves out"):
        evaluate_run(result.folder, None, tmp_path / "out", tmp_path / "task", HOW)


def test_a_file_of_the_training_examples_is_told(ran: RunResult, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "known.jsonl"
    spec = load_answering_student(ran.folder).spec
    known = load_splits(spec.data, root=tmp_path).train[:3]
    fields = [{"prompt": e.prompt, "reasoning": e.reasoning, "answer": e.answer} for e in known]
    file.write_text("".join(json.dumps(one) + "\n" for one in fields))
    for _ in range(2):
        evaluate_run(ran.folder, file, tmp_path / "out", None, HOW)
    told = capsys.readouterr().out
    assert "duplicates across: 3 of these examples" in told
    assert "judged here 1 times before: a test set is for one look" in told


def test_what_does_not_fit_is_refused(ran: RunResult, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^--max-new-tokens: the longest prompt and 128 new tokens"):
        evaluate_run(ran.folder, None, tmp_path, None, AnswerOptions("fields", None, 5, 128))
    with pytest.raises(SpecError, match="not a run directory"):
        evaluate_run(tmp_path, None, tmp_path, None, HOW)


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (3, 11), (500, 1000)])
def test_wilsons_interval_is_scipys(right: int, count: int) -> None:
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert wilson_interval(right, count) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("target", "answer"), [(51.0, "51"), (39, "39"), (0.5, "0.5"), (-3.0, "-3"), (1e3, "1000"), (2.50, "2.5")]
)
def test_pal_targets(target: Any, answer: str) -> None:
    assert example_from_pal({"input": "How many?", "target": target}, "here") == Example(
        "How many?", "", answer, task="pal"
    )


@pytest.mark.parametrize("target", [None, "", "many", True, [1], "NaN", "Infinity"])
def test_pal_targets_must_be_numbers(target: Any) -> None:
    with pytest.raises(SpecError, match=r"^f:3: field 'target' must be a number"):
        example_from_pal({"input": "How many?", "target": target}, "f:3")


@pytest.mark.parametrize(("name", "count"), [("svamp", 1000), ("multiarith", 600)])
def test_the_real_files(shared_data: Path, name: str, count: int) -> None:
    examples = read_examples(shared_data / name / f"{name}.jsonl", "pal")
    assert len(examples) == count
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", example.answer) for example in examples)


WRITTEN = [
    *("#5", "# 5", "#5 and more", "#5.0", "#+5", "#$5", "#05", "no marker 5", "#", "#five", "1 2 #5", "#6"),
    *(
        "#5#6",
        "#1,005",
        "#1,00,5",
        "#-5",
        "#\N{MINUS SIGN}5",
        "#5.",
        "#5\nmore",
        "#5%",
        "#1/2",
        "#.5",
        "#5 <eos>",
    ),
]


@pytest.mark.parametrize("gold", ["5", "1005", "-5", "12", "0.5", "1/2", "five"])
def test_the_harness_judges_as_kava_does(ran: RunResult, tmp_path: Path, gold: str) -> None:
    """The task's own file, loaded as the harness loads it: by its path, without kava."""
    student = load_answering_student(ran.folder)
    assert write_harness_task(tmp_path, student, [Example("1+2", "", gold)], 6) == "kava_tiny"
    assert "process_results: !function 'judge.process_results'" in (tmp_path / "task.yaml").read_text()
    judge = runpy.run_path(str(tmp_path / "judge.py"))
    template = Template(answer=" #{answer}")
    marks = [judge["process_results"]({"answer": gold}, [text])["exact_match"] for text in WRITTEN]
    assert marks == [is_correct(text, Example("", "", gold), template) for text in WRITTEN]
    assert 0 < sum(marks) < len(marks) or gold == "12"


def test_the_judge_needs_no_kava(ran: RunResult, tmp_path: Path) -> None:
    write_harness_task(tmp_path, load_answering_student(ran.folder), [Example("1+2", "", "3")], 6)
    code = "import sys, judge; print({'kava_core', 'torch'} & {name.split('.')[0] for name in sys.modules})"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert shown.stdout == "set()\n"


def test_what_the_harness_does_not_see_is_refused(ran: RunResult, tmp_path: Path) -> None:
    student = load_answering_student(ran.folder)
    student.tokenizer.add_tokens(["#"], special_tokens=True)
    with pytest.raises(SpecError, match="--lm-eval: the marker ' #' holds the special token '#'"):
        write_harness_task(tmp_path, student, [Example("1+2", "", "3")], 6)


def test_the_real_harness_gives_the_same_score(ran: RunResult, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'kava[eval]')")
    from lm_eval.tasks import TaskManager

    evaluate_run(ran.folder, None, tmp_path / "out", tmp_path / "task", HOW)
    export_student(ran.folder, tmp_path / "student")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'student'},device=cpu",
        tasks=["kava_tiny"],
        task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
        batch_size=4,
    )
    score = found["results"]["kava_tiny"]["exact_match,none"]
    assert score == pytest.approx(json.loads((tmp_path / "out" / "result.json").read_text())["exact_match"])
