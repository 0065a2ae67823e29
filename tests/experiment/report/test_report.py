"""``kava report``: what stands in its page, its figures and its tables."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import stats

from kava_core.errors import CheckpointError, KavaError, SpecError
from kava_core.experiment.load_experiment import Experiment, LoadedRun
from kava_core.experiment.report.experiment_data import ExperimentData, mean_curve, slug_of_name
from kava_core.experiment.report.pages.display_text import (
    amount_text,
    figure_text,
    number_ranges,
    printable_text,
    short_labels,
    shorten,
)
from kava_core.experiment.report.pages.markdown_page import escape_markdown
from kava_core.experiment.report.sections.compared_settings import setting_text, spec_differences
from kava_core.experiment.report.write_report import write_report
from tests.experiment.report.report_runs import (
    COMPUTE,
    HOSTILE,
    SPEC,
    declare,
    fail,
    falling,
    hostile,
    write_run,
)

KV = [1.10, 1.20, 1.15, 1.30, 1.05, 1.22, 1.12, 1.18]
NO_KV = [1.30, 1.45, 1.25, 1.60, 1.20, 1.41, 1.35, 1.38]
SHUFFLED = [1.20, 1.18, 1.30, 1.29, 1.16, 1.19, 1.14, 1.17]
CONTROLS = {"metric": "ce", "controls": ["no_kv", "shuffled_teacher"]}


def experiment(folder: Path, **changes: Any) -> Path:
    """Three variants with eight seeds, all complete."""
    for variant, ends in {"kv": KV, "no_kv": NO_KV, "shuffled_teacher": SHUFFLED}.items():
        for seed, end in enumerate(ends):
            kv = {} if variant == "no_kv" else {"relation": end / 10, "weight/wide": 1.0}
            losses = [] if variant == "no_kv" else SPEC["losses"]
            write_run(folder, variant, seed, falling(end, **kv), spec=SPEC | {"losses": losses})
    declare(folder, CONTROLS, "kv", **changes)
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of ``experiment``."""
    folder = tmp_path_factory.mktemp("three")
    list(write_report([experiment(folder / "x")], folder / "out"))
    return folder / "out"


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of ``hostile``."""
    folder = tmp_path_factory.mktemp("attacked")
    list(write_report([hostile(folder / "x")], folder / "out"))
    return folder / "out"


def page_of(output: Path) -> Page:
    return Page((output / "report.html").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """What a page holds that a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """All that is read."""
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every such element."""
        return [found for name, found in self.tags if name == tag]


def written_page(folder: Path, output: Path) -> Page:
    list(write_report([folder], output))
    return page_of(output)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_all_files_are_written_and_told(tmp_path: Path) -> None:
    told = list(write_report([experiment(tmp_path / "x")]))
    output = tmp_path / "x" / "report"
    assert told[0] == f"report: {output / 'report.html'}"
    names = {"report.html", "report.md", "runs.csv", "curves.csv", "figures"}
    names |= {"comparisons.csv", "comparisons.json"}
    assert {file.name for file in output.iterdir()} == names
    figures = {file.name for file in (output / "figures").iterdir()}
    drawn = {"curve-ce", "curve-exact-match", "curve-relation", "differences", "cost"}
    assert figures == {f"{name}.{ending}" for name in drawn for ending in ("png", "svg")}


def test_the_page_needs_nothing_else(three: Path) -> None:
    page = page_of(three)
    assert not page.all("script")
    assert not [tag for tag, _ in page.tags if tag in ("iframe", "object", "embed", "form", "base")]
    addresses = [found[name] for _, found in page.tags for name in ("src", "href", "srcset") if name in found]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not [name for _, found in page.tags for name in found if name.startswith("on")]
    assert all(len(image["alt"]) > 20 for image in page.all("img"))
    places = {found["id"] for _, found in page.tags if "id" in found}
    assert {link["href"].removeprefix("#") for link in page.all("a")} <= places
    assert len(page.all("img")) == 2 * 5  # light and dark


def test_every_table_scrolls_in_itself(three: Path) -> None:
    page = page_of(three)
    before = [found for (tag, found), (after, _) in pairwise(page.tags) if after == "table"]
    assert len(before) == 4
    assert all(found.get("class") == "scroll" for found in before)


def exact_p(other: list[float]) -> float:
    """The sign-flip test of scipy against ``KV``, over all changes of sign."""
    gaps = np.subtract(KV, other)
    test = stats.permutation_test((gaps,), np.mean, permutation_type="samples", n_resamples=np.inf)
    return float(test.pvalue)


def test_numbers_against_scipy(three: Path) -> None:
    page = page_of(three)
    first, second = rows(three / "comparisons.csv")
    gaps = np.subtract(KV, NO_KV)
    test = stats.ttest_rel(KV, NO_KV)
    assert float(first["difference"]) == pytest.approx(gaps.mean())
    assert float(first["t_test_p"]) == pytest.approx(test.pvalue)
    exact = [exact_p(row) for row in (NO_KV, SHUFFLED)]
    assert [float(row["sign_flip_p"]) for row in (first, second)] == pytest.approx(exact)
    low, high = test.confidence_interval()
    assert (float(first["low"]), float(first["high"])) == pytest.approx((low, high))
    assert float(first["holm"]) == pytest.approx(2 * exact[0])
    assert float(second["holm"]) == pytest.approx(max(2 * exact[0], exact[1]))
    assert f"exact sign-flip p {exact[0]:.3g}, Holm {2 * exact[0]:.3g} of 2; paired t-test p" in page.text
    assert (first["outcome"], second["outcome"]) == ("better", "not shown")
    assert f"{gaps.mean():+.3g} ce" in page.text
    told = (
        "Not shown that KV distillation helps here: untrained_teacher, token_identity were not run; kv does "
        "not beat shuffled_teacher (not shown)."
    )
    assert told in page.text


def test_means_stand_in_the_page_and_the_markdown(three: Path) -> None:
    page = page_of(three)
    text = (three / "report.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| kv | 8 of 8"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:5] == [f"{mean(KV):.4g}", f"{stdev(KV):.3g}"]
    assert cells[5:] == ["1,000", "2,000", "3e9", "1.5", "0.5", ", ".join(f"{value:.4g}" for value in KV)]
    assert all(cell in page.text for cell in cells)
    gap = float(np.subtract(KV, NO_KV).mean())
    assert f"kv − no_kv: {gap:+.4g} ce; 95 % t-interval" in text


def test_curves_and_runs_as_csv(three: Path) -> None:
    runs = rows(three / "runs.csv")
    assert [float(run["ce"]) for run in runs] == KV + NO_KV + SHUFFLED
    assert {run["state"] for run in runs} == {"complete"}
    assert float(runs[0]["compute flops"]) == 3e9
    assert [float(run["compared_value"]) for run in runs] == KV + NO_KV + SHUFFLED
    assert {run["compared_metric"] for run in runs} == {"ce"}
    assert runs[8]["relation"] == ""
    curves = rows(three / "curves.csv")
    one = [row for row in curves if (row["variant"], row["seed"], row["metric"]) == ("kv", "3", "ce")]
    assert [(int(row["step"]), float(row["value"])) for row in one] == [(20, 2.3), (40, 1.3)]


def test_the_same_runs_give_the_same_files(tmp_path: Path) -> None:
    folder = experiment(tmp_path / "x")
    for name in ("a", "b"):
        list(write_report([folder], tmp_path / name))
    for file in (tmp_path / "a").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file


def test_several_experiments_in_one_report(tmp_path: Path) -> None:
    folders = [experiment(tmp_path / "first" / "x"), experiment(tmp_path / "second" / "x")]
    with pytest.raises(SpecError, match="--output"):
        list(write_report(folders))
    list(write_report(folders, tmp_path / "out"))
    page = page_of(tmp_path / "out")
    assert len(page.all("h1")) == 2
    assert page.text.count("How to read this") == 2  # the contents and the section: once, at the end
    assert (tmp_path / "out" / "figures" / "1-cost.svg").exists()
    assert (tmp_path / "out" / "figures" / "2-cost.svg").exists()
    assert len(rows(tmp_path / "out" / "comparisons.csv")) == 4


def test_a_target_that_was_not_met_is_a_bound_everywhere(tmp_path: Path) -> None:
    for seed in range(8):
        for variant, reached in (("kv", 2), ("no_kv", 5 if seed < 6 else None)):
            curve = [{"ce": 1.0, "exact_match": float(reached is not None and reached <= place)}
                     for place in range(1, 7)]  # fmt: skip
            write_run(tmp_path / "x", variant, seed, curve)
    compare = {"metric": "steps_to_target", "target": 0.9, "controls": ["no_kv"]}
    declare(tmp_path / "x", compare, "kv")
    page = written_page(tmp_path / "x", tmp_path / "out")
    kept = {(run["variant"], run["seed"]): run for run in rows(tmp_path / "out" / "runs.csv")}
    assert kept["kv", "0"]["compared_value"] == "40.0"
    assert kept["no_kv", "0"]["compared_value"] == "100.0"
    assert kept["no_kv", "7"]["compared_value"] == "> 120"
    (found,) = rows(tmp_path / "out" / "comparisons.csv")
    assert (found["censored_first"], found["censored_second"], found["outcome"]) == ("0", "2", "better")
    assert "no_kv did not meet the target in 2 of 8 seeds" in page.text
    (kept_json,) = json.loads((tmp_path / "out" / "comparisons.json").read_text(encoding="utf-8"))
    assert "untrained_teacher, token_identity were not run" in kept_json["distillation"]
    (verdict,) = kept_json["comparisons"]
    assert (verdict["outcome"], verdict["censored"], verdict["sign_flip_p"]) == ("better", [0, 2], 2 / 2**8)
    assert verdict["differences"] == {str(seed): -60.0 if seed < 6 else -100.0 for seed in range(8)}
    bound = (6 * 100 + 2 * 140) / 8
    assert "100, 100, 100, 100, 100, 100, > 120, > 120" in page.text
    assert f"> {bound:.4g}" in page.text


def test_runs_that_several_experiments_share_are_told_and_counted_once(tmp_path: Path) -> None:
    """The second experiment only lies beside the first, with the same no_kv runs under another digest."""
    for name in ("x", "beside"):
        for seed in range(8):
            kv = KV if name == "x" else SHUFFLED
            write_run(tmp_path / name, "kv", seed, falling(kv[seed]))
            write_run(tmp_path / name, "no_kv", seed, falling(NO_KV[seed]), spec_digest=name)
        declare(tmp_path / name, {"metric": "ce", "controls": ["no_kv"]}, "kv")
    for seed in (0, 1):
        write_run(tmp_path / "x", "again", seed, falling(KV[seed]))
    declare(tmp_path / "x", {"metric": "ce", "controls": ["no_kv"]}, "kv")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "experiment.json").write_text("{")
    text = written_page(tmp_path / "x", tmp_path / "out").text
    told = "have the same numbers at every evaluation"
    assert f"Shared runs: no_kv, no_kv of beside {told} (seeds 0, 1, 2, 3, 4, 5, 6, 7): they are" in text
    assert f"Shared runs: kv, again {told} (seeds 0, 1): they are one set of runs" in text
    assert "18 of 18 complete 16 distinct runs" in text
    alone = written_page(tmp_path / "beside", tmp_path / "out2").text
    assert "distinct runs" not in alone


def test_differences_between_runs_are_pointed_out(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    data = {"train": {"examples": 9, "sha256": "c" * 64}, "validation": {"examples": 8, "sha256": "b" * 64}}
    write_run(folder, "kv", 0, falling(1.0), threads=2)
    write_run(folder, "kv", 1, falling(1.1), device="H100")
    write_run(folder, "other", 0, falling(1.2), data=data, versions={"torch": "2.6.0"})
    write_run(folder, "other", 1, falling(1.2))
    text = written_page(folder, tmp_path / "out").text
    a, c = "a" * 12, "c" * 12
    told = f"training data: 8 examples, sha256 {a} in 3 runs; 9 examples, sha256 {c} in other (0)."
    assert f"Runs differ in {told}" in text
    assert "Runs differ in threads: 1 in 3 runs; 2 in kv (0)." in text
    assert "Runs differ in device: cpu in 3 runs; H100 in kv (1)." in text
    assert "Runs differ in version of torch: 2.13.0 in 3 runs; 2.6.0 in other (0)." in text
    assert "Runs differ in validation data" not in text


def test_specs_differ_where_they_differ() -> None:
    loss = SPEC["losses"][0]
    projector = {"align": {"dim_projector": {"name": "linear", "seed": 0}}}
    other = SPEC | {
        "name": "another",
        "seeds": [7],
        "losses": [],
        "teachers": [SPEC["teachers"][0] | projector],
        "train": {"steps": 40, "shuffle_teacher": True},
        "extra": {},
    }
    told = {
        place: (setting_text(one), setting_text(two)) for place, one, two in spec_differences(SPEC, other)
    }
    assert told == {
        "losses": ("relation (weight 1.0, parts values)", "none"),
        "teachers.0.align.dim_projector": ("calibrated (method pca)", "linear (seed 0)"),
        "train.shuffle_teacher": ("false", "true"),
        "extra": ("–", "{}"),
    }
    two = SPEC | {"losses": [loss | {"weight": 2.0}]}
    assert spec_differences(SPEC, two) == [("losses.0.weight", 1.0, 2.0)]
    assert spec_differences(SPEC, SPEC) == []


def test_changed_comparisons_are_told(tmp_path: Path) -> None:
    before = {"compare": {"metric": "exact_match", "controls": ["no_kv"], "pairs": []}, "treatment": "kv"}
    before |= {"declared": "2026-11-01T00:00:00+00:00"}
    late = experiment(tmp_path / "late", earlier=[before | {"complete": 7}])
    text = written_page(late, tmp_path / "out").text
    assert "7 runs complete at the change) they were kv − no_kv, by exact match." in text
    early = experiment(tmp_path / "early", earlier=[before | {"complete": 0}])
    assert "changed before any run was complete" in written_page(early, tmp_path / "out").text


def test_one_seed(tmp_path: Path) -> None:
    for variant, end in (("kv", 1.0), ("no_kv", 1.5)):
        write_run(tmp_path / "x", variant, 0, falling(end))
    declare(tmp_path / "x", {"metric": "ce", "controls": ["no_kv"]}, "kv")
    text = written_page(tmp_path / "x", tmp_path / "out").text
    assert "There is one seed: no interval, no test" in text
    assert "descriptive" in text
    assert rows(tmp_path / "out" / "comparisons.csv")[0]["sign_flip_p"] == "nan"


def test_one_variant_and_nothing_declared(tmp_path: Path) -> None:
    write_run(tmp_path / "x", "main", 0, falling(1.0), compute={})
    text = written_page(tmp_path / "x", tmp_path / "out").text
    assert "There is one variant: nothing to compare it with." in text
    assert "No comparison was declared, so none is judged." in text
    assert "kept no record of what training cost" in text
    assert rows(tmp_path / "out" / "comparisons.csv") == []


def test_nothing_has_run_yet(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    runs = [{"variant": name, "seed": 0, "folder": name} for name in ("kv", "no_kv")]
    declare(folder, {"controls": ["no_kv"]}, "kv", runs=runs)
    text = written_page(folder, tmp_path / "out").text
    assert "No run is complete: there is nothing to compare yet." in text
    assert "kv − no_kv was declared, and no seed is complete in both." in text
    assert "No run has been evaluated yet." in text
    assert "No run of kv has begun" in text
    assert "2 missing" in text


def test_all_runs_failed(tmp_path: Path) -> None:
    for seed in (0, 1, 2, 4):
        fail(write_run(tmp_path / "x", "kv", seed, []), "SpecError: too wide")
    text = written_page(tmp_path / "x", tmp_path / "out").text
    assert "kv, seeds 0–2, 4: failed: SpecError: too wide" in text
    assert "0 of 4 complete" in text
    assert {run["failure"] for run in rows(tmp_path / "out" / "runs.csv")} == {"SpecError: too wide"}


def test_identical_results(tmp_path: Path) -> None:
    for seed in range(8):
        for variant in ("kv", "no_kv"):
            write_run(tmp_path / "x", variant, seed, falling(1.0, **{"collapse/wide/keys/rank": 3.0}))
    declare(tmp_path / "x", {"metric": "ce", "controls": ["no_kv"]}, "kv")
    text = written_page(tmp_path / "x", tmp_path / "out").text
    assert "no difference in any seed" in text
    assert "The same in every run at every step: rank: wide, keys 3." in text


def test_a_missing_metric_names_its_run(tmp_path: Path) -> None:
    folder = experiment(tmp_path / "x")
    run = write_run(folder, "kv", 8, [{"ce": float("nan"), "exact_match": 0.1}])
    declare(folder, CONTROLS, "kv")
    text = written_page(folder, tmp_path / "out").text
    assert f"No verdicts: {run}: its results have no finite 'ce'" in text
    assert "Learning curves" in text
    row = next(
        line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "| kv | 9" in line
    )
    assert row.split("|")[4].strip() == "–"


def test_runs_judged_on_different_examples_get_no_verdict(tmp_path: Path) -> None:
    for seed in range(5):
        write_run(tmp_path / "x", "kv", seed, falling(1.0), correct=[1, 0])
        write_run(tmp_path / "x", "no_kv", seed, falling(1.0), correct=[1, 0, 1])
    declare(tmp_path / "x", {"controls": ["no_kv"]}, "kv")
    text = written_page(tmp_path / "x", tmp_path / "out").text
    assert "incomplete (seed 0: kv answered 2 examples, no_kv 3)" in text


def test_figures_of_like_names_have_files_of_their_own() -> None:
    found = ExperimentData(Experiment("x", Path("x"), []))
    names = [found.unique_name("curve", name) for name in ("a b", "a-b", "A_B", "a b 2", "é", "../..")]
    assert names == ["curve-a-b", "curve-a-b-2", "curve-a-b-3", "curve-a-b-2-2", "curve", "curve-2"]


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = experiment(tmp_path / "x")
    (folder / "run-3" / "spec.json").write_text("{")
    (folder / "run-0" / "spec.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"run-0/spec\.json: holds a list"):
        list(write_report([folder]))


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KavaError, match="cannot be written"):
        list(write_report([experiment(tmp_path / "x")], tmp_path / "file"))


def test_routing_weights_that_move_are_drawn(tmp_path: Path) -> None:
    for seed in range(2):
        moving = [
            {"ce": 1.0, "weight/a": 0.5 + x, "weight/b": 0.5 - x, "weight/a@sum": x} for x in (0.0, 0.1)
        ]
        write_run(tmp_path / "x", "router", seed, moving)
        write_run(tmp_path / "x", "fixed", seed, falling(1.0, **{"weight/a": 0.25, "weight/b": 0.75}))
    page = written_page(tmp_path / "x", tmp_path / "out")
    assert "Weights that never change: a 0.25, b 0.75 (fixed)." in page.text
    assert [file.name for file in (tmp_path / "out" / "figures").glob("routing*.png")] == [
        "routing-router.png"
    ]
    svg = (tmp_path / "out" / "figures" / "routing-router.svg").read_text(encoding="utf-8")
    assert {"all examples", "sum", "a", "b"} <= {node.text for node in ElementTree.fromstring(svg).iter()}


def test_layer_maps_are_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", "kv", 0, falling(1.0))
    (run / "layer_maps").mkdir()
    similarity = np.array([[0.5, 0.25, 0.125], [0.1, 0.9, 0.3]], dtype=np.float32)
    matrix = np.array([[1, 0, 0], [0, 0.5, 0.5]], dtype=np.float32)
    save_file({"similarity": similarity, "matrix": matrix}, run / "layer_maps" / "wide.safetensors")
    page = written_page(tmp_path / "x", tmp_path / "out")
    told = {image["alt"] for image in page.all("img") if "Similarity" in image["alt"]}
    assert [alt.endswith("student layer: heaviest teacher layer 0: 0, 1: 1") for alt in told] == [True]
    svg = (tmp_path / "out" / "figures" / "layers-kv-wide.svg").read_text(encoding="utf-8")
    assert {"0.50", "0.12", "0.90"} <= {node.text for node in ElementTree.fromstring(svg).iter()}
    (run / "layer_maps" / "wide.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"wide\.safetensors: unreadable"):
        list(write_report([tmp_path / "x"]))


def test_answers_right_and_wrong(tmp_path: Path) -> None:
    answers = [
        {"prompt": f"p{i}", "gold": "1", "wrote": "1" if i < 5 else "two\nlines", "correct": i < 5}
        for i in range(8)
    ]
    write_run(tmp_path / "x", "kv", 0, falling(1.0), samples=answers)
    page = written_page(tmp_path / "x", tmp_path / "out")
    assert "kv, seed 0: 5 right, 3 wrong were kept" in page.text
    assert [found["class"] for found in page.all("dl")] == ["good", "good", "bad", "bad"]
    assert "two\nlines" in page.words


def test_hostile_names_do_nothing_in_the_page(attacked: Path) -> None:
    page = page_of(attacked)
    assert not page.all("script")
    assert not [name for image in page.all("img") for name in image if name not in ("class", "src", "alt")]
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert HOSTILE[0] in page.text
    assert HOSTILE[9] in page.text
    assert "\\u202eright to left" in page.text
    assert "half \\ud83d of a pair \\x00\\x1b[31m" in page.text


def test_hostile_names_do_nothing_in_the_figures(attacked: Path) -> None:
    figures = list((attacked / "figures").glob("*.svg"))
    assert len(figures) > 10
    texts = []
    for file in figures:
        nodes = list(ElementTree.fromstring(file.read_text(encoding="utf-8")).iter())
        assert not [node for node in nodes if node.tag.endswith(("script", "image", "foreignObject"))]
        texts += [node.text or "" for node in nodes]
    assert "$\\frac{x$ & $y$" in texts
    assert " _hidden" in texts
    assert not any("\u202e" in text or "\x00" in text for text in texts)
    assert len([file for file in figures if file.name.startswith("collapse-")]) == len(HOSTILE)


def test_hostile_names_do_nothing_in_a_spreadsheet(attacked: Path) -> None:
    for name in ("runs.csv", "curves.csv", "comparisons.csv"):
        with (attacked / name).open(newline="", encoding="utf-8") as stream:
            cells = [cell for row in csv.reader(stream) for cell in row]
        risky = [cell for cell in cells if cell.lstrip().startswith(("=", "+", "@", "-"))]
        assert all(is_number(cell) for cell in risky), risky
    assert f"'{HOSTILE[4]}" in [run["variant"] for run in rows(attacked / "runs.csv")]


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def test_hostile_names_break_no_markdown_table(attacked: Path) -> None:
    text = (attacked / "report.md").read_text(encoding="utf-8")
    assert "<" not in text
    lines = text.splitlines()
    widths = [line.replace("\\\\", "").replace("\\|", "").count("|") for line in lines]
    for (line, width), (after, next_width) in pairwise(zip(lines, widths, strict=True)):
        if line.startswith("|") and after.startswith("|"):
            assert width == next_width, (line, after)
    assert not [line for line in lines if line.startswith("# ") and "title" in line]


def test_markdown_escapes_what_is_markup() -> None:
    assert escape_markdown("a_b _c_ *d* |e| <f> $g$ `h` [i]") == (
        r"a_b \_c\_ \*d\* \|e\| &lt;f&gt; \$g\$ \`h\` \[i\]"
    )
    assert escape_markdown("two\nlines") == "two lines"


def test_texts_for_people() -> None:
    assert number_ranges([4, 0, 1, 2, 7]) == "0–2, 4, 7"
    assert shorten("a" * 50) == "a" * 23 + "…" + "a" * 12
    assert printable_text("a\u202eb\ud800\x07") == "a\\u202eb\\ud800\\x07"
    assert printable_text("👩‍👧 é") == "👩‍👧 é"
    assert printable_text("a\nb", keep="\n") == "a\nb"
    assert short_labels(["x" * 60 + "1" * 12, "x" * 61 + "1" * 12]).values() != 1
    assert (
        len(set(short_labels([f"{'x' * place}{'y' * 40}{'z' * 12}" for place in (30, 31, 32)]).values())) == 3
    )
    assert figure_text("_a $b$") == r" _a \$b\$"
    assert [amount_text(x) for x in (0.12345, 1200.0, 999999.0, 3.31192e8, float("nan"), -2e-7)] == [
        *("0.1235", "1,200", "999,999", "3.312e8", "–", "-2e-7")
    ]
    assert (slug_of_name("A b/c"), slug_of_name("é"), slug_of_name("../../x")) == ("a-b-c", "", "x")


def test_the_mean_is_over_complete_runs_at_shared_steps() -> None:
    def run(seed: int, state: Any = "complete") -> LoadedRun:
        return LoadedRun("kv", seed, Path(), state)

    curves = [
        (run(0), [(1, 1.0), (2, 2.0), (3, 3.0)]),
        (run(1), [(2, 4.0), (3, 7.0), (4, 9.0)]),
        (run(2, "failed"), [(2, 100.0)]),
    ]
    assert mean_curve(curves) == [(2, 3.0), (3, 5.0)]
    assert mean_curve(curves[2:]) == []


def test_no_torch_from_end_to_end(tmp_path: Path) -> None:
    folder = experiment(tmp_path / "x")
    code = (
        "import sys\n"
        "from kava_core.cli.app import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as stopped:\n"
        "    print(stopped.code, [name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("KAVA_")}
    command = [sys.executable, "-c", code, "report", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert done.stderr == ""


def test_what_is_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kava_core.experiment.report.write_report.find_spec", lambda name: None if name == "scipy" else name
    )
    with pytest.raises(KavaError, match=r"needs scipy: pip install 'kava\[stats\]'"):
        list(write_report([tmp_path]))


def test_a_run_cut_off_while_writing_is_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", "kv", 0, falling(1.0), samples=[{"prompt": "p", "correct": False}])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run / name).open("a") as stream:
            stream.write(json.dumps({"step": 60})[:-3])
    assert "0 right, 1 wrong" in written_page(tmp_path / "x", tmp_path / "out").text


def test_what_is_faster_in_steps_may_be_slower_in_compute(tmp_path: Path) -> None:
    """Target 0.5: reached at step 40 of 60 for 3e9 operations, and at step 60 of 60 for a tenth of them."""
    folder = tmp_path / "x"
    cheap = COMPUTE | {"flops": 3.0e8}
    for seed in range(2):
        write_run(folder, "kv", seed, [{"ce": 0.9}, {"ce": 0.4}, {"ce": 0.3}])
        write_run(folder, "no_kv", seed, [{"ce": 0.9}, {"ce": 0.8}, {"ce": 0.5}], compute=cheap)
    compare = {"metric": "steps_to_target", "of": "ce", "target": 0.5, "controls": ["no_kv"]}
    declare(folder, compare, "kv")
    list(write_report([folder], tmp_path / "out"))
    table = (
        (tmp_path / "out" / "report.md").read_text(encoding="utf-8").partition("Means of complete runs")[2]
    )
    head, _, *rows = [line.split(" | ") for line in table.splitlines() if line.startswith("|")][:4]
    place = head.index("FLOPs to the target")
    assert [row[place] for row in rows] == ["2e9", "3e8"]
