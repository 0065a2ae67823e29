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
from kava_core.experiment.distillation_claim import NEEDED_CONTROLS, sentence_on_distillation
from kava_core.experiment.load_experiment import Experiment, LoadedRun
from kava_core.experiment.result_tables import comparison_lines, table_of_means
from kava_core.experiment.verdict import judge_comparisons, steps_for_equal_flops
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


HIGH = [0.9, 0.95, 0.92, 0.97, 0.91, 0.96, 0.9, 0.93]
LOW = [0.5, 0.6, 0.52, 0.61, 0.55, 0.58, 0.6, 0.53]
SEEDS = 8


def exact_p(first: Sequence[float], second: Sequence[float]) -> float:
    """The sign-flip test of scipy, over all 256 changes of sign."""
    gaps = np.subtract(first, second)
    test = stats.permutation_test((gaps,), np.mean, permutation_type="samples", n_resamples=np.inf)
    return float(test.pvalue)


def test_p_values_are_scipys_and_holm_is_over_the_family() -> None:
    other = [0.88, 0.96, 0.90, 0.95, 0.93, 0.97, 0.91, 0.91]
    found = judge_comparisons(
        experiment({"kv": HIGH, "a": LOW, "b": other}, pairs=[("kv", "a"), ("kv", "b")])
    )
    raw = [exact_p(HIGH, row) for row in (LOW, other)]
    assert raw[0] == 2 / 2**8
    assert [v.test.t_p for v in found] == pytest.approx(
        [stats.ttest_rel(HIGH, row).pvalue for row in (LOW, other)]
    )
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
    (found,) = judge_comparisons(experiment({"kv": HIGH[:7], "a": LOW[:7]}, pairs=[("kv", "a")]))
    assert (found.outcome, found.reason) == ("descriptive", "7 of the 8 seeds that a verdict needs")
    (alone,) = judge_comparisons(experiment({"kv": HIGH[:1], "a": LOW[:1]}, pairs=[("kv", "a")]))
    assert alone.outcome == "descriptive"
    assert "1 shared seed;" in alone.sentence(CompareSpec())


def test_the_same_difference_in_every_seed_needs_no_spread() -> None:
    (found,) = judge_comparisons(experiment({"kv": [1.0] * 8, "a": [0.5] * 8}, pairs=[("kv", "a")]))
    assert (found.outcome, found.test.p, math.isnan(found.test.t_p)) == ("better", 2 / 2**8, True)
    sentence = found.sentence(CompareSpec())
    assert "exact sign-flip p 0.00781, Holm 0.00781 of 1; budgets" in sentence
    assert "t-test" not in sentence


def test_a_family_that_the_seeds_cannot_decide_is_told() -> None:
    """Eight seeds give 2/256 at best, and seven comparisons raise that above 5 %."""
    rows = {f"v{place}": LOW for place in range(7)}
    found = judge_comparisons(experiment({"kv": HIGH} | rows, pairs=[("kv", name) for name in rows]))
    assert {verdict.outcome for verdict in found} == {"not shown"}
    assert found[0].reason == "8 seeds are too few for 7 comparisons: Holm's p cannot go below 0.0547"


def test_a_failed_or_missing_run_forbids_a_verdict() -> None:
    (found,) = judge_comparisons(experiment({"kv": [*HIGH, None], "a": [*LOW, 0.5]}, pairs=[("kv", "a")]))
    assert (found.outcome, found.reason, found.test.n) == ("incomplete", "kv seed 8 failed", 8)


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
        for seed in range(SEEDS):
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
    binomial = 2 * 1.96 * math.sqrt((0.16 + 0.25) / (200 * SEEDS))
    assert 0.9 * binomial < high - low < 1.9 * binomial  # drawing seeds adds to drawing examples
    assert "bootstrap over seeds and examples" in found.sentence(CompareSpec())


def controlled(unbeaten: str = "", without: str = "", more: tuple[str, ...] = ()) -> str:
    """The sentence where the treatment beats every needed control but one, and one was not run."""
    names = tuple(name for name in (*NEEDED_CONTROLS, *more) if name != without)
    rows = {name: HIGH[::-1] if name == unbeaten else LOW for name in names}
    one = experiment({"kv": HIGH} | rows, controls=names)
    return sentence_on_distillation(one, judge_comparisons(one))


def test_kv_helps_only_where_it_beats_all_four_controls() -> None:
    assert controlled() == (
        "KV distillation helps here: kv beats no_kv, shuffled_teacher, untrained_teacher and token_identity."
    )
    for name in NEEDED_CONTROLS:
        assert controlled(unbeaten=name) == (
            f"Not shown that KV distillation helps here: kv does not beat {name} (not shown)."
        )
        assert controlled(without=name) == (f"Not shown that KV distillation helps here: {name} was not run.")


def test_shuffled_weights_have_to_be_beaten_where_they_were_run() -> None:
    more = ("shuffled_weights",)
    assert controlled(more=more).endswith("untrained_teacher, token_identity and shuffled_weights.")
    assert controlled(unbeaten="shuffled_weights", more=more) == (
        "Not shown that KV distillation helps here: kv does not beat shuffled_weights (not shown)."
    )


def test_records_from_before_these_controls_say_what_is_missing() -> None:
    old = experiment({"kv": HIGH, "no_kv": LOW, "shuffled_teacher": LOW}, controls=NEEDED_CONTROLS[:2])
    assert sentence_on_distillation(old, judge_comparisons(old)) == (
        "Not shown that KV distillation helps here: untrained_teacher, token_identity were not run."
    )


def test_steps_that_the_same_operations_buy() -> None:
    one = experiment({"kv": HIGH, "no_kv": LOW}, {"kv": {"flops": 75.0}}, controls=("no_kv",))
    (found,) = judge_comparisons(one)
    assert steps_for_equal_flops(one, found) == 250
    assert "  for the same FLOPs, no_kv could train 250 steps" in list(comparison_lines(one))


def test_the_table_counts_what_is_not_there() -> None:
    table = table_of_means(experiment({"kv": [*HIGH, None], "a": LOW}, pairs=[("kv", "a")]))
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["complete"] == ["8 of 9", "8 of 8"]
    assert cells["failed"] == ["1", "0"]
    assert cells["mean"] == [f"{np.mean(HIGH):.3g}", f"{np.mean(LOW):.3g}"]


def test_changed_comparisons_are_told() -> None:
    one = experiment({"kv": HIGH, "a": LOW}, pairs=[("kv", "a")])
    changed = Experiment(
        "x", Path("x"), one.runs, one.compare, "kv", [{"declared": "2026-11-22", "complete": 7}]
    )
    assert any("replaced when 7 of its runs were complete" in line for line in comparison_lines(changed))


@pytest.mark.parametrize("family", [1, 4])
@pytest.mark.parametrize("n", [8, 10])
@pytest.mark.parametrize("draws", [150, pytest.param(800, marks=pytest.mark.release)])
def test_verdicts_are_wrong_in_at_most_five_of_a_hundred_families(n: int, family: int, draws: int) -> None:
    """Seeds share a difficulty, variants differ by nothing: any verdict of better or worse is false."""
    drawn = np.random.default_rng(n * family)
    names = [f"v{place}" for place in range(family)]
    false = 0
    for _ in range(draws):
        base = drawn.normal(size=n)
        values = {name: (base + 0.5 * drawn.normal(size=n)).tolist() for name in ("kv", *names)}
        found = judge_comparisons(experiment(values, pairs=[("kv", name) for name in names]))
        false += any(verdict.outcome in ("better", "worse") for verdict in found)
    allowed = 0.05 + 1.645 * math.sqrt(0.05 * 0.95 / draws)
    assert false / draws <= allowed
    assert family > 1 or false / draws >= 0.015


@pytest.mark.parametrize("draws", [150, pytest.param(800, marks=pytest.mark.release)])
def test_effects_are_found_about_as_often_as_by_a_t_test(draws: int) -> None:
    """Eight seeds, a true difference of 1.5 standard deviations: against the noncentral t distribution."""
    drawn, found = np.random.default_rng(5), 0
    for _ in range(draws):
        values = {"kv": (1.5 + drawn.normal(size=8)).tolist(), "a": [0.0] * 8}
        (verdict,) = judge_comparisons(experiment(values, pairs=[("kv", "a")]))
        found += verdict.outcome == "better"
    power = stats.nct.sf(stats.t.ppf(0.975, 7), 7, 1.5 * math.sqrt(8))
    assert found / draws == pytest.approx(power, abs=0.04 + 2 * math.sqrt(power * (1 - power) / draws))


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


def run_with_curve(
    folder: Path, variant: str, seed: int, reached: float | None, *, steps: int = 300, every: int = 50
) -> LoadedRun:
    """A run that answers everything from step ``reached`` on, evaluated every ``every`` steps."""
    lines = []
    for step in range(every, steps + 1, every):
        met = reached is not None and reached <= step
        lines.append({"step": step, "eval_ce": 1, "eval_exact_match": float(met)})
    (folder / f"{variant}-{seed}").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{variant}-{seed}" / "metrics.jsonl").write_text(text)
    return run(variant, seed, 0.5, folder)


def to_target(folder: Path, reached: Mapping[str, Sequence[float | None]], every: int = 50) -> Experiment:
    runs = []
    for variant, row in reached.items():
        for seed, step in enumerate(row):
            runs.append(run_with_curve(folder, variant, seed, step, every=every))
    compare = CompareSpec(metric="steps_to_target", target=0.9, pairs=[("kv", "a")])
    return Experiment("x", folder, runs, compare, "kv")


def test_less_than_one_interval_is_not_better(tmp_path: Path) -> None:
    """Seven seeds of eight are one interval faster: significant, and less than an interval in the mean."""
    (found,) = judge_comparisons(to_target(tmp_path, {"kv": [100] * 8, "a": [150] * 7 + [100]}))
    assert (found.test.mean, found.test.p) == (-43.75, 2 / 2**7)
    assert (found.outcome, found.reason) == (
        "less than one evaluation interval",
        "43.75 of 50; evaluate more often",
    )


def test_the_same_difference_is_better_where_it_is_resolved(tmp_path: Path) -> None:
    (found,) = judge_comparisons(to_target(tmp_path, {"kv": [100] * 8, "a": [150] * 7 + [100]}, every=10))
    assert (found.test.mean, found.outcome) == (-43.75, "better")


def test_a_control_that_misses_the_target_is_a_bound(tmp_path: Path) -> None:
    one = to_target(tmp_path, {"kv": [100] * 8, "a": [200] * 6 + [None] * 2})
    (found,) = judge_comparisons(one)
    assert found.differences == dict.fromkeys(range(6), -100.0) | dict.fromkeys((6, 7), -250.0)
    assert (found.outcome, found.censored, found.mean_texts()) == ("better", (0, 2), ("100", "> 237.5"))
    assert "a did not meet the target in 2 of 8 seeds;" in found.sentence(one.compare or CompareSpec())
    cells = {column.header: list(column.cells) for column in table_of_means(one).columns}
    assert cells["each seed"][1] == "200, 200, 200, 200, 200, 200, > 300, > 300"
    assert (cells["mean"], cells["± SD"]) == (["100", "> 238"], ["0", "–"])


def test_a_treatment_that_misses_the_target_is_not_better(tmp_path: Path) -> None:
    """By its bound it would be significantly faster; how slow it is in seed 7 nobody knows."""
    (found,) = judge_comparisons(to_target(tmp_path, {"kv": [50] * 7 + [None], "a": [300] * 8}))
    assert found.test.p <= 0.05
    reason = "kv did not meet the target in 1 seed in which a did"
    assert (found.outcome, found.reason) == ("not shown", reason)


def test_runs_that_both_miss_the_target_are_alike(tmp_path: Path) -> None:
    (found,) = judge_comparisons(to_target(tmp_path, {"kv": [100] * 7 + [None], "a": [250] * 7 + [None]}))
    assert (found.differences[7], found.censored, found.outcome) == (0.0, (1, 1), "better")


def test_a_variant_that_never_arrives_is_not_faster(tmp_path: Path) -> None:
    """Steps count up to what all compared runs have; the longer ones are not looked at beyond it."""
    runs = []
    for variant, steps, reached in (("kv", 100, 0), ("longer", 300, 200)):
        for seed in range(SEEDS):
            reached_now = reached + 10 * seed if reached else None
            runs.append(run_with_curve(tmp_path, variant, seed, reached_now, steps=steps))
    compare = CompareSpec(metric="steps_to_target", target=0.9, pairs=[("kv", "longer")])
    (found,) = judge_comparisons(Experiment("x", tmp_path, runs, compare, "kv"))
    assert found.means == (150.0, 150.0)
    assert found.outcome == "not shown"


def test_a_comparison_without_a_shared_seed_is_told() -> None:
    one = experiment({"kv": HIGH, "a": [None] * 8}, pairs=[("kv", "a")])
    assert "kv − a: incomplete: no seed is complete in both" in list(comparison_lines(one))
