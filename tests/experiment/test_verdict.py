"""Verdicts over synthetic runs: against scipy, and how often they are wrong where there is nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kava_core.errors import KavaError
from kava_core.experiment.load_experiment import Experiment, LoadedRun
from kava_core.experiment.result_tables import comparison_lines, table_of_means
from kava_core.experiment.verdict import judge_comparisons, sentence_on_distillation, steps_for_equal_flops
from kava_core.runs.folder import Folder
from kava_core.specfile.sections.compare import CompareSpec

EQUAL = {"student_tokens": 10, "teacher_tokens": 20, "flops": 30.0, "seconds": 1.0}


def run(
    variant: str, seed: int, value: float | None, folder: Path = Path("nowhere"), **changes: Any
) -> LoadedRun:
    """A complete run with this exact match, or a failed one."""
    state = "failed" if value is None else "complete"
    record = {"results": {"steps": 100, "exact_match": value}, "compute": EQUAL | changes.pop("compute", {})}
    return LoadedRun(
        variant, seed, Folder(folder / f"{variant}-{seed}"), changes.pop("state", state), record | changes
    )


def experiment(
    values: Mapping[str, Sequence[float | None]],
    compute: Mapping[str, Mapping[str, float]] | None = None,
    treatment: str = "kv",
    **fields: Any,
) -> Experiment:
    runs = [
        run(name, seed, value, compute=(compute or {}).get(name, {}))
        for name, row in values.items()
        for seed, value in enumerate(row)
    ]
    return Experiment("x", Path("x"), runs, CompareSpec(**fields), treatment)


HIGH, LOW = [0.9, 0.95, 0.92, 0.97, 0.91], [0.5, 0.6, 0.52, 0.61, 0.55]


def test_p_values_are_scipys_and_holm_is_over_the_family() -> None:
    other = [0.88, 0.96, 0.90, 0.95, 0.93]
    found = judge_comparisons(
        experiment({"kv": HIGH, "a": LOW, "b": other}, pairs=[("kv", "a"), ("kv", "b")])
    )
    raw = [stats.ttest_rel(HIGH, row).pvalue for row in (LOW, other)]
    assert [v.test.p for v in found] == pytest.approx(raw)
    assert found[0].holm == pytest.approx(2 * min(raw))
    assert found[1].holm == pytest.approx(max(raw))
    assert [v.bonferroni for v in found] == pytest.approx([min(1, 2 * p) for p in raw])
    assert [v.outcome for v in found] == ["better", "not shown"]
    assert found[0].means == pytest.approx((np.mean(HIGH), np.mean(LOW)))


def test_lower_is_better_where_the_metric_says_so() -> None:
    values = {"kv": HIGH, "a": LOW}
    (found,) = judge_comparisons(experiment(values, pairs=[("kv", "a")], goal="lower"))
    assert found.outcome == "worse"


def test_few_seeds_describe() -> None:
    (found,) = judge_comparisons(experiment({"kv": HIGH[:4], "a": LOW[:4]}, pairs=[("kv", "a")]))
    assert (found.outcome, found.reason) == ("descriptive", "4 of the 5 seeds that a verdict needs")
    (alone,) = judge_comparisons(experiment({"kv": HIGH[:1], "a": LOW[:1]}, pairs=[("kv", "a")]))
    assert alone.outcome == "descriptive"
    assert "1 shared seed;" in alone.sentence(CompareSpec())


def test_the_same_difference_in_every_seed_is_no_test() -> None:
    (found,) = judge_comparisons(experiment({"kv": [1.0] * 5, "a": [0.5] * 5}, pairs=[("kv", "a")]))
    assert (found.outcome, math.isnan(found.test.p)) == ("descriptive", True)
    assert "the same difference in every seed" in found.reason


def test_a_failed_or_missing_run_forbids_a_verdict() -> None:
    (found,) = judge_comparisons(experiment({"kv": [*HIGH, None], "a": [*LOW, 0.5]}, pairs=[("kv", "a")]))
    assert (found.outcome, found.reason, found.test.n) == ("incomplete", "kv seed 5 failed", 5)


@pytest.mark.parametrize(
    ("changed", "unequal", "outcome"),
    [
        ({"flops": 30.29}, (), "better"),
        ({"flops": 30.31}, (), "unequal budgets"),
        ({"flops": 29.6}, (), "unequal budgets"),
        ({"flops": 90.0, "teacher_tokens": 0}, ("flops",), "unequal budgets"),
        ({"flops": 90.0, "teacher_tokens": 0}, ("flops", "teacher_tokens"), "better"),
        ({"student_tokens": 11}, ("flops", "teacher_tokens"), "unequal budgets"),
    ],
)
def test_better_needs_equal_budgets_or_a_word(
    changed: dict[str, float], unequal: tuple[Any, ...], outcome: str
) -> None:
    one = experiment({"kv": HIGH, "a": LOW}, {"kv": changed}, pairs=[("kv", "a")], unequal=unequal)
    (found,) = judge_comparisons(one)
    assert found.outcome == outcome
    assert found.budgets["flops"] == pytest.approx(changed.get("flops", 30.0) / 30.0)


def test_runs_that_counted_nothing_are_not_equal() -> None:
    one = experiment({"kv": HIGH, "a": LOW}, pairs=[("kv", "a")])
    bare = [LoadedRun(r.variant, r.seed, r.folder, r.state, {"results": r.results}) for r in one.runs]
    (found,) = judge_comparisons(Experiment("x", Path("x"), bare, one.compare, "kv"))
    assert (found.outcome, found.reason) == (
        "unequal budgets",
        "no record of what the runs cost; not declared in compare.unequal",
    )


def test_a_missing_metric_is_an_error_and_never_zero() -> None:
    one = experiment({"kv": HIGH, "a": LOW}, pairs=[("kv", "a")], metric="relation", goal="lower")
    with pytest.raises(
        KavaError, match=r"kv-0: its results have no finite 'relation'; there are exact_match"
    ):
        judge_comparisons(one)


def test_examples_are_resampled_where_they_were_kept(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    runs = []
    for variant, rate in (("kv", 0.8), ("a", 0.5)):
        for seed in range(5):
            marks = (drawn.random(200) < rate).astype(int).tolist()
            folder = tmp_path / f"{variant}-{seed}"
            folder.mkdir()
            (folder / "correct.json").write_text(json.dumps(marks))
            runs.append(run(variant, seed, float(np.mean(marks)), tmp_path))
    one = Experiment("x", tmp_path, runs, CompareSpec(pairs=[("kv", "a")]), "kv")
    (found,) = judge_comparisons(one)
    assert found.resampled is not None
    low, high = found.resampled
    assert low < found.test.mean < high
    binomial = 2 * 1.96 * math.sqrt((0.16 + 0.25) / 1000)
    assert 0.9 * binomial < high - low < 1.9 * binomial  # drawing seeds adds to drawing examples
    assert "bootstrap over seeds and examples" in found.sentence(CompareSpec())


CONTROLS = {"controls": ("no_kv", "shuffled_teacher")}


def test_kv_helps_only_where_it_beats_both_controls() -> None:
    both = experiment({"kv": HIGH, "no_kv": LOW, "shuffled_teacher": LOW}, **CONTROLS)
    assert (
        sentence_on_distillation(both, judge_comparisons(both))
        == "KV distillation helps here: kv beats no_kv and shuffled_teacher."
    )
    one = experiment({"kv": HIGH, "no_kv": LOW, "shuffled_teacher": HIGH[::-1]}, **CONTROLS)
    assert sentence_on_distillation(one, judge_comparisons(one)) == (
        "Not shown that KV distillation helps here: kv does not beat shuffled_teacher (not shown)."
    )
    asked = experiment({"kv": HIGH, "no_kv": LOW}, controls=("no_kv",))
    assert "declare the controls shuffled_teacher" in sentence_on_distillation(
        asked, judge_comparisons(asked)
    )


def test_steps_that_the_same_operations_buy() -> None:
    one = experiment({"kv": HIGH, "no_kv": LOW}, {"kv": {"flops": 75.0}}, controls=("no_kv",))
    (found,) = judge_comparisons(one)
    assert steps_for_equal_flops(one, found) == 250
    assert "  for the same FLOPs, no_kv could train 250 steps" in list(comparison_lines(one))


def test_the_table_counts_what_is_not_there() -> None:
    table = table_of_means(experiment({"kv": [*HIGH, None], "a": LOW}, pairs=[("kv", "a")]))
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["complete"] == ["5 of 6", "5 of 5"]
    assert cells["failed"] == ["1", "0"]
    assert cells["mean"] == [f"{np.mean(HIGH):.3g}", f"{np.mean(LOW):.3g}"]


def test_changed_comparisons_are_told() -> None:
    one = experiment({"kv": HIGH, "a": LOW}, pairs=[("kv", "a")])
    changed = Experiment(
        "x", Path("x"), one.runs, one.compare, "kv", [{"declared": "2026-11-22", "complete": 7}]
    )
    assert any("replaced when 7 of its runs were complete" in line for line in comparison_lines(changed))


@pytest.mark.parametrize("family", [1, 4])
@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("draws", [150, pytest.param(800, marks=pytest.mark.release)])
def test_verdicts_are_wrong_in_at_most_six_of_a_hundred_families(n: int, family: int, draws: int) -> None:
    """Seeds share a difficulty, variants differ by nothing: any verdict of better or worse is false."""
    drawn = np.random.default_rng(n * family)
    names = [f"v{place}" for place in range(family)]
    false = 0
    for _ in range(draws):
        base = drawn.normal(size=n)
        values = {name: (base + 0.5 * drawn.normal(size=n)).tolist() for name in ("kv", *names)}
        found = judge_comparisons(experiment(values, pairs=[("kv", name) for name in names]))
        false += any(verdict.outcome in ("better", "worse") for verdict in found)
    allowed = 0.06 + 1.645 * math.sqrt(0.05 * 0.95 / draws)
    assert false / draws <= allowed
    assert family > 1 or false / draws >= 0.02


def test_other_examples_are_no_comparison() -> None:
    one = experiment({"kv": HIGH, "a": LOW}, pairs=[("kv", "a")])
    for name in ({"train": {"sha256": "1"}}, {"kept": {"validation": "1"}}):
        runs = [
            LoadedRun(
                r.variant, r.seed, r.folder, r.state, r.record | ({"data": name} if r.variant == "a" else {})
            )
            for r in one.runs
        ]
        (found,) = judge_comparisons(Experiment("x", Path("x"), runs, one.compare, "kv"))
        assert found.outcome == "incomplete"
        assert found.reason.startswith("seed 0: kv and a have other")


def test_a_variant_that_never_arrives_is_not_faster(tmp_path: Path) -> None:
    """Steps count up to what all compared runs have; the longer ones are not looked at beyond it."""
    runs = []
    for variant, steps, reached in (("kv", 100, 0), ("longer", 300, 200)):
        for seed in range(5):
            folder = tmp_path / f"{variant}-{seed}"
            folder.mkdir()
            lines = (
                {
                    "step": step,
                    "eval_ce": 1,
                    "eval_exact_match": float(bool(reached) and reached + 10 * seed <= step),
                }
                for step in range(50, steps + 1, 50)
            )
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            runs.append(run(variant, seed, 0.5, tmp_path))
    compare = CompareSpec(metric="steps_to_target", target=0.9, pairs=[("kv", "longer")])
    (found,) = judge_comparisons(Experiment("x", tmp_path, runs, compare, "kv"))
    assert found.means == (150.0, 150.0)
    assert found.outcome == "not shown"


def test_a_comparison_without_a_shared_seed_is_told() -> None:
    one = experiment({"kv": HIGH, "a": [None] * 5}, pairs=[("kv", "a")])
    assert "kv − a: incomplete: no seed is complete in both" in list(comparison_lines(one))
