"""Write the verdicts of a report as JSON, for programs that go on with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kava_core.experiment.distillation_claim import sentence_on_distillation
from kava_core.experiment.report.experiment_data import ExperimentData
from kava_core.experiment.verdict import Verdict
from kava_core.files import finite_or_null


def json_text(experiments: Sequence[ExperimentData]) -> str:
    """Return the text of ``comparisons.json``; what is not a number is null."""
    whole = finite_or_null([_experiment_fields(data) for data in experiments])
    return json.dumps(whole, indent=1, ensure_ascii=True) + "\n"


def _experiment_fields(data: ExperimentData) -> dict[str, Any]:
    experiment = data.experiment
    sentence = sentence_on_distillation(experiment, data.verdicts) if data.verdicts else ""
    return {
        "experiment": experiment.name,
        "metric": data.compare.metric,
        "distillation": sentence,
        "no_verdicts": data.why_no_verdicts,
        "shared_runs": [shared.sentence(experiment.name) for shared in data.shared_runs],
        "comparisons": [_verdict_fields(verdict) for verdict in data.verdicts],
    }


def _verdict_fields(verdict: Verdict) -> dict[str, Any]:
    fields: dict[str, Any] = asdict(verdict)
    tested: dict[str, Any] = fields.pop("test")
    fields["sign_flip_p"], fields["t_test_p"] = tested.pop("p"), tested.pop("t_p")
    return fields | tested
