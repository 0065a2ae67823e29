"""The conformance kit finds what it is for: planted faults, each by the right test, in a plain sentence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.source import ROOT

Failures = dict[str, dict[str, str]]
"""Suite to the tests that failed and what they said."""

FAULTS = [
    ("WrongAxis", "test_axes", r"must return shape \[2, 3, 2, 5, 4\] .*; it returned \[2, 3, 5, 2, 4\]"),
    (
        "WrongDtype",
        "test_dtype_is_kept",
        r"keep the dtype of its input \(torch.bfloat16\); got torch.float32",
    ),
    (
        "InPlace",
        "test_inputs_are_left_alone",
        r"must leave its inputs unchanged; one was written to in place",
    ),
    ("BatchLeak", "test_examples_are_independent", r"must not depend on the others of its batch; .* up to"),
    ("TimeLeak", "test_positions_are_independent", r"must not depend on other positions.*up to inf"),
    ("Detached", "test_gradient_reaches_the_input", r"must stay attached to the input; it is detached"),
    ("FalselyLinear", "test_linear_is_linear", r"with linear = True weighted means must pass unchanged"),
    ("FalselyShared", "test_shared_width_is_shared", r"every head must be projected alike"),
    ("Noisy", "test_same_input_same_output", r"must give the same output for the same input"),
    ("Forgetful", "test_state_round_trip", r"loads a saved state_dict\(\) must give the same output"),
    (
        "Homesick",
        "test_runs_on_the_meta_device",
        r"must keep the device of its input \(meta\); got \['cpu'\]",
    ),
    ("PeeksAtPadding", "test_calibration_sees_valid_positions_only", r"must not enter the calibration"),
    ("MaskLeak", "test_weight_0_has_no_influence", r"weight 0 must have no influence \(it held nan\)"),
    ("DetachedLoss", "test_gradient_reaches_the_student", r"must stay attached to the student"),
    ("HalfSum", "test_sums_are_at_least_float32", r"must be torch.float32; it is torch.bfloat16"),
    ("WrongView", "test_views_agree", r"must have equal layers and heads"),
    ("DroppedFold", "test_fold_is_attached", r"fold must keep every number of the student"),
    ("ReadsNeighbour", "test_border_accepts_the_map", r"index of the TimeMap must be from 0 .*, not -1"),
    ("DividesByNothing", "test_calibrated_state_is_finite", r"must hold finite parameters and buffers"),
    ("ReadsPadding", "test_rows_are_means", r"the teacher's padding must have weight 0"),
    ("BatchLength", "test_examples_are_independent", r"must not depend on the others of its batch"),
    ("SumsToTwo", "test_rows_are_means", r"weights must sum to 1; the sums are \[2.0, 2.0, 2.0\]"),
    ("Restless", "test_constant_without_parameters", r"zeros at the same places every time"),
    ("Negative", "test_weights_are_at_least_0", r"must be at least 0; one is -0.5"),
    ("UnnamedLayers", "test_one_layer_alone", r"name parameters by layer in 'layered'"),
    ("DetachedWeight", "test_gradient_reaches_the_weight", r"by which fusers learn; the loss is detached"),
    ("LayerLeak", "test_layers_are_independent", r"must be the sum over its layers, each taken alone"),
    ("Peeks", "test_targets_are_needed_or_not_looked_at", r"without them it raised StopIteration"),
    (
        "SeesMasked",
        "test_masked_teachers_have_no_influence",
        r"no influence at positions where it is not valid",
    ),
]
SOUND = ["Cropped", "Absolute", "FirstHeads", "Shift", "First", "Equal"]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Failures:
    """Every suite's failures, from one run of pytest in a process of its own."""
    report = tmp_path_factory.mktemp("kit") / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *options,
        str(ROOT / "tests" / "meta" / "planted" / "suites.py"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout
    return _read(report)


def _read(report: Path) -> Failures:
    found: Failures = defaultdict(dict)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        suite = found[case.attrib["classname"].rpartition(".Test")[2]]
        for failure in case.iter("failure"):
            suite.setdefault(case.attrib["name"].partition("[")[0], failure.attrib["message"])
    return found


@pytest.mark.parametrize(("suite", "test", "said"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_the_fault_is_found(failures: Failures, suite: str, test: str, said: str) -> None:
    assert test in failures[suite], failures[suite]
    assert re.search(said, failures[suite][test]), failures[suite][test]


@pytest.mark.parametrize("suite", SOUND)
def test_the_sound_twin_passes(failures: Failures, suite: str) -> None:
    assert suite in failures
    assert failures[suite] == {}


def test_messages_are_one_sentence(failures: Failures) -> None:
    """The contract and what was seen, on one line."""
    for suite, test, _ in FAULTS:
        assert re.fullmatch(r"(Failed: )?[^\n;]+; [^\n]+", failures[suite][test]), failures[suite][test]
