"""Summarise an experiment in the first section: what came out, and what did not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import get_args

from kava_core.experiment.distillation_claim import HELPS, sentence_on_distillation
from kava_core.experiment.outcome import TOO_FINE
from kava_core.experiment.report.experiment_data import ExperimentData
from kava_core.experiment.report.pages.display_text import (
    count_text,
    metric_words,
    plural_text,
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
from kava_core.experiment.shared_runs import count_distinct_runs
from kava_core.experiment.verdict import (
    Verdict,
    comparisons_without_verdict,
    steps_for_equal_flops,
)
from kava_core.runs.folder import State

TONES: dict[str, Tone] = {
    "better": "good",
    "worse": "bad",
    "unequal budgets": "warning",
    "incomplete": "warning",
    TOO_FINE: "warning",
}
STATE_TONES: dict[State, Tone] = {"complete": "good", "failed": "bad", "missing": "warning"}


def summary_section(data: ExperimentData) -> Section:
    """Return verdicts, counts, failures, and whether the comparisons were changed."""
    blocks: list[Block] = [_count_tiles(data)]
    sentence = sentence_on_distillation(data.experiment, data.verdicts) if data.verdicts else ""
    if sentence:
        tone: Tone = "good" if sentence.startswith(HELPS) else "open"
        blocks.append(Paragraph(printable_text(sentence), tone))
    blocks += [Paragraph(text, "warning") for text in _caveats(data)]
    if data.verdicts:
        blocks.append(Cards([_card_of_verdict(data, verdict) for verdict in data.verdicts]))
    blocks += [Paragraph(text, "bad") for text in _failure_texts(data)]
    blocks += [Paragraph(text, "warning") for text in (*_change_texts(data), *_uneven_texts(data))]
    return Section("summary", "Summary", blocks)


def _count_tiles(data: ExperimentData) -> Tiles:
    experiment = data.experiment
    tiles: list[tuple[str, str, Tone]] = []
    for state in get_args(State):
        count = experiment.count_runs(state)
        if state == "complete":
            tiles.append((f"{count} of {len(experiment.runs)}", state, _tone_of_state(state)))
        elif count:
            tiles.append((str(count), state, _tone_of_state(state)))
    distinct = count_distinct_runs(experiment)
    if distinct < experiment.count_runs("complete"):
        tiles.append((str(distinct), "distinct runs", "warning"))
    for thing, count in (("variant", len(experiment.variants)), ("seed", len(experiment.seeds))):
        tiles.append((str(count), plural_text(count, thing), "plain"))
    return Tiles(tiles)


def _tone_of_state(state: State) -> Tone:
    return STATE_TONES.get(state, "open")


def _card_of_verdict(data: ExperimentData, verdict: Verdict) -> Card:
    test, compare = verdict.test, data.compare
    low, high = (f"{number:+.3g}" for number in (test.low, test.high))
    notes = []
    steps = steps_for_equal_flops(data.experiment, verdict)
    if verdict.outcome == "unequal budgets" and steps:
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


def _caveats(data: ExperimentData) -> Iterator[str]:
    """Yield why there are fewer verdicts than one could wish."""
    experiment = data.experiment
    if not experiment.count_runs("complete"):
        yield "No run is complete: there is nothing to compare yet."
    if not data.declared_pairs:
        yield "No comparison was declared before the runs: all this describes, and proves nothing."
    if data.why_no_verdicts:
        yield printable_text(f"No verdicts: {data.why_no_verdicts}.")
    else:
        for first, second in comparisons_without_verdict(experiment, data.verdicts):
            yield printable_text(f"{first} − {second} was declared, and no seed is complete in both.")
    if not data.declared_pairs or data.why_no_verdicts:
        for text in data.texts_on_lacking():
            if text != data.why_no_verdicts:
                yield printable_text(f"Left out of means and figures: {text}.")
    yield from _narrowness_texts(data)


def _narrowness_texts(data: ExperimentData) -> Iterator[str]:
    """Yield how little of the evidence is independent."""
    experiment = data.experiment
    for shared in data.shared_runs:
        yield printable_text(f"Shared runs: {shared.sentence(experiment.name)}.")
    if len(experiment.variants) == 1:
        yield "There is one variant: nothing to compare it with."
    if len(experiment.seeds) == 1:
        yield "There is one seed: no interval, no test, and no telling chance from effect."


def _failure_texts(data: ExperimentData) -> Iterator[str]:
    """Yield a sentence for every reason of every variant."""
    seeds_by_reason: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for run in data.experiment.runs:
        if run.state != "complete":
            error = str((run.failure or {}).get("error", ""))
            seeds_by_reason[run.variant, run.state, error].append(run.seed)
    for (variant, state, error), seeds in seeds_by_reason.items():
        reason = f": {error}" if error else ""
        yield printable_text(f"{variant}, {seeds_text(seeds)}: {state}{reason}")


def _uneven_texts(data: ExperimentData) -> Iterator[str]:
    names = list(uneven_facts(data))
    if names:
        yield printable_text(f"Runs differ in {', '.join(names)}: see “What was compared”.")


def _change_texts(data: ExperimentData) -> Iterator[str]:
    """Yield a sentence for every plan that was recorded earlier and changed."""
    for plan in data.experiment.earlier:
        if not plan["complete"]:
            yield printable_text(
                f"The comparisons of {plan['declared']} were changed before any run was complete."
            )
            continue
        compare = plan["compare"]
        pairs = [f"{plan['treatment']} − {control}" for control in compare.get("controls", ())]
        pairs += [f"{first} − {second}" for first, second in compare.get("pairs", ())]
        complete = count_text(plan["complete"], "run")
        metric = metric_words(compare.get("metric", "exact_match"))
        yield printable_text(
            "Comparisons, variants, settings or seeds were changed after they were declared. As to the "
            f"comparisons, until then ({plan['declared']}, {complete} complete at the change) they were "
            f"{', '.join(pairs) or 'none'}, by {metric}. Results could have been seen before the change."
        )
