"""Say whether KV distillation helped: only where every control is beaten that could explain it away."""

from __future__ import annotations

from collections.abc import Sequence

from kava_core.experiment.load_experiment import Experiment
from kava_core.experiment.verdict import Verdict
from kava_core.specfile.sections.compare import Control

NEEDED_CONTROLS: tuple[Control, ...] = (
    "no_kv",
    "shuffled_teacher",
    "untrained_teacher",
    "token_identity",
)
"""What KV distillation has to beat before it is said to help: training without it, another example's cache, a
teacher that knows nothing, and tokens without a teacher."""

HELPS = "KV distillation helps here"
"""How the sentence on distillation begins where it helped, and nowhere else."""


def sentence_on_distillation(experiment: Experiment, verdicts: Sequence[Verdict]) -> str:
    """Return a sentence on whether KV distillation helped: only if it beats all controls that can show it.

    ``shuffled_weights`` has to be beaten as well where it was run. Empty if no control is declared.
    """
    compare = experiment.compare
    if compare is None or not compare.controls:
        return ""
    needed = [*NEEDED_CONTROLS, *(name for name in compare.controls if name == "shuffled_weights")]
    not_run = [name for name in needed if name not in compare.controls]
    outcomes = {v.second: v.outcome for v in verdicts if v.first == experiment.treatment}
    unbeaten = []
    for name in needed:
        outcome = outcomes.get(name, "no shared seed")
        if name not in not_run and outcome != "better":
            unbeaten.append(f"{name} ({outcome})")
    reasons = []
    if not_run:
        reasons.append(f"{', '.join(not_run)} {'was' if len(not_run) == 1 else 'were'} not run")
    if unbeaten:
        reasons.append(f"{experiment.treatment} does not beat {', '.join(unbeaten)}")
    if reasons:
        return f"Not shown that KV distillation helps here: {'; '.join(reasons)}."
    return f"{HELPS}: {experiment.treatment} beats {', '.join(needed[:-1])} and {needed[-1]}."
