"""The first section: what came out, and what did not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import get_args

from kava_core.experiment.report.experiment_data import ExperimentData
from kava_core.experiment.report.pages.display_text import (
    count_text,
    metric_words,
    printable_text,
    seeds_text,
)
from kava_core.experiment.report.pages.page_elements import (
    Block,
    Card,
    Cards,
    Paragraph,
    Section,
    Tiles,
    Tone,
)
from kava_core.experiment.report.sections.compared_settings import uneven_facts
from kava_core.experiment.verdict import (
    Verdict,
    comparisons_without_verdict,
    sentence_on_distillation,
    steps_for_equal_flops,
)
from kava_core.runs.folder import State

TONES: dict[str, Tone] = {
    "better": "good",
    "worse": "bad",
    "unequal budgets": "warning",
    "incomplete": "warning",
}
STATE_TONES: dict[State, Tone] = {"complete": "good", "failed": "bad", "missing": "warning"}


def summary_section(found: ExperimentData) -> Section:
    """Verdicts, counts, failures, and whether the comparisons were changed."""
    blocks: list[Block] = [_count_tiles(found)]
    if found.verdicts and (sentence := sentence_on_distillation(found.experiment, found.verdicts)):
        tone: Tone = "good" if sentence.startswith("KV distillation helps") else "open"
        blocks.append(Paragraph(printable_text(sentence), tone))
    blocks += [Paragraph(text, "warning") for text in _caveats(found)]
    if found.verdicts:
        blocks.append(Cards([_card_of_verdict(found, verdict) for verdict in found.verdicts]))
    blocks += [Paragraph(text, "bad") for text in _failure_texts(found)]
    blocks += [Paragraph(text, "warning") for text in (*_change_texts(found), *_uneven_texts(found))]
    return Section("summary", "Summary", blocks)


def _count_tiles(found: ExperimentData) -> Tiles:
    experiment = found.experiment
    counts = [(state, experiment.count_runs(state)) for state in get_args(State)]
    there: list[tuple[str, str, Tone]] = [
        (
            f"{count} of {len(experiment.runs)}" if state == "complete" else str(count),
            state,
            _tone_of_state(state),
        )
        for state, count in counts
        if count or state == "complete"
    ]
    variants, number = len(experiment.variants), len(experiment.seeds)
    there.append((str(variants), count_text(variants, "variant").split()[1], "plain"))
    return Tiles([*there, (str(number), count_text(number, "seed").split()[1], "plain")])


def _tone_of_state(state: State) -> Tone:
    return STATE_TONES.get(state, "open")


def _card_of_verdict(found: ExperimentData, verdict: Verdict) -> Card:
    test, compare = verdict.test, found.compare
    low, high = (f"{number:+.3g}" for number in (test.low, test.high))
    notes = []
    if verdict.outcome == "unequal budgets" and (steps := steps_for_equal_flops(found.experiment, verdict)):
        notes.append(f"For the same FLOPs, {printable_text(verdict.second)} could train {steps} steps.")
    return Card(
        title=printable_text(f"{verdict.first} − {verdict.second}"),
        word=verdict.outcome,
        tone=TONES.get(verdict.outcome, "open"),
        large=f"{test.mean:+.3g} {metric_words(compare.metric)}",
        small=f"95 % {low} … {high}" if math.isfinite(test.low) else "no interval",
        sentence=printable_text(verdict.sentence(compare)),
        notes=notes,
    )


def _caveats(found: ExperimentData) -> Iterator[str]:
    """Why there are fewer verdicts than one could wish."""
    experiment = found.experiment
    if not experiment.count_runs("complete"):
        yield "No run is complete: there is nothing to compare yet."
    if not found.declared:
        yield "No comparison was declared before the runs: all this describes, and proves nothing."
    if found.problem:
        yield printable_text(f"No verdicts: {found.problem}.")
    else:
        for first, second in comparisons_without_verdict(experiment, found.verdicts):
            yield printable_text(f"{first} − {second} was declared, and no seed is complete in both.")
    if found.declared == [] or found.problem:
        for text in (one for one in found.lacking() if one != found.problem):
            yield printable_text(f"Left out of means and figures: {text}.")
    if len(experiment.variants) == 1:
        yield "There is one variant: nothing to compare it with."
    if len(experiment.seeds) == 1:
        yield "There is one seed: no interval, no test, and no telling chance from effect."


def _failure_texts(found: ExperimentData) -> Iterator[str]:
    """A sentence for every reason of every variant."""
    reasons: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for run in found.experiment.runs:
        if run.state != "complete":
            said = str((run.failure or {}).get("error", ""))
            reasons[run.variant, run.state, said].append(run.seed)
    for (variant, state, said), those in reasons.items():
        reason = f": {said}" if said else ""
        yield printable_text(f"{variant}, {seeds_text(those)}: {state}{reason}")


def _uneven_texts(found: ExperimentData) -> Iterator[str]:
    names = list(uneven_facts(found))
    if names:
        yield printable_text(f"Runs differ in {', '.join(names)}: see “What was compared”.")


def _change_texts(found: ExperimentData) -> Iterator[str]:
    for before in found.experiment.earlier:
        compare = before["compare"]
        asked = [*(f"{before['treatment']} − {one}" for one in compare.get("controls", ()))]
        asked += [f"{first} − {second}" for first, second in compare.get("pairs", ())]
        done = count_text(before["complete"], "run")
        yield printable_text(
            "Comparisons, variants, settings or seeds were changed after they were declared. As to the "
            f"comparisons, until then ({before['declared']}, {done} complete at the change) they were "
            f"{', '.join(asked) or 'none'}, by "
            f"{metric_words(compare.get('metric', 'exact_match'))}. "
            "Results could have been seen before the change."
            if before["complete"]
            else f"The comparisons of {before['declared']} were changed before any run was complete."
        )
