"""Show what was compared with what: specs, data, machines, versions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from kava_core.experiment.load_experiment import LoadedRun
from kava_core.experiment.report.experiment_data import ExperimentData
from kava_core.experiment.report.pages.display_text import count_text, number_ranges, printable_text
from kava_core.experiment.report.pages.page_elements import Block, PageTable, Paragraph, Section

NOT_OF_ONE_RUN = ("name", "variants", "seeds", "compare", "output")
"""Settings that do not change a single run."""

HASH = 12
"""Characters of a hash that are shown."""

MOST_VARIANTS = 4
"""Variants that are named beside one value."""

ABSENT = object()
"""Stands for a setting that one spec does not have."""


def compared_section(data: ExperimentData) -> Section:
    """Return specs as differences from the treatment's, data, versions and machines."""
    blocks: list[Block] = []
    for name, values in uneven_facts(data).items():
        sentence = printable_text(f"Runs differ in {name}: {_text_of_values(values)}.")
        blocks.append(Paragraph(sentence, "warning"))
    blocks += [_settings_block(data), _facts_block(data)]
    return Section("compared", "What was compared", blocks)


Difference = tuple[str, Any, Any]
"""Dotted path, the value here, the value there."""


def spec_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """Return where two specs differ, as deep as they have the same shape and the same component."""
    return list(_differences_below("", _settings_of_run(one), _settings_of_run(other)))


def _settings_of_run(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in spec.items() if name not in NOT_OF_ONE_RUN}


def _differences_below(path: str, one: Any, other: Any) -> Iterator[Difference]:
    if _have_same_shape(one, other):
        for name, first, second in _parts_of_both(one, other):
            yield from _differences_below(f"{path}.{name}" if path else name, first, second)
    elif one is ABSENT or other is ABSENT or one != other:
        yield path, one, other


def _have_same_shape(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return bool(one.get("name") == other.get("name"))
    both = isinstance(one, list) and isinstance(other, list) and len(one) == len(other)
    return both and all(isinstance(item, Mapping) for item in (*one, *other))


def _parts_of_both(one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, list):
        for place, (first, second) in enumerate(zip(one, other, strict=True)):
            yield str(place), first, second
    else:
        for name in dict.fromkeys([*one, *other]):
            yield name, one.get(name, ABSENT), other.get(name, ABSENT)


def setting_text(value: Any) -> str:
    """Return a setting in a line: a component by its name, then its fields."""
    if value is ABSENT:
        return "–"
    if isinstance(value, Mapping):
        fields = ", ".join(f"{name} {setting_text(inner)}" for name, inner in value.items() if name != "name")
        named = f"{value['name']} " if "name" in value else ""
        return f"{named}({fields})" if fields else named.strip() or "{}"
    if isinstance(value, list):
        return "; ".join(map(setting_text, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _settings_block(data: ExperimentData) -> Block:
    base = data.specs_by_variant.get(data.treatment)
    if base is None:
        reason = f"No run of {data.treatment} has begun, so specs cannot be set against its spec."
        return Paragraph(printable_text(reason))
    rows = []
    for variant in data.experiment.variants:
        if variant != data.treatment:
            for row in _rows_of_variant(data, base, variant):
                rows.append([printable_text(variant), *row])
    if not rows:
        return Paragraph("There is no second variant whose spec could differ.")
    head = ["variant", "setting", printable_text(data.treatment), "this variant"]
    return PageTable(
        printable_text(f"Settings that differ from those of {data.treatment}"),
        head,
        rows,
        left=2,
        texts=(2, 3),
    )


def _rows_of_variant(data: ExperimentData, base: Mapping[str, Any], variant: str) -> list[list[str]]:
    if variant not in data.specs_by_variant:
        return [["no run has begun", "", ""]]
    changed = spec_differences(base, data.specs_by_variant[variant])
    rows = [
        [printable_text(place), printable_text(setting_text(one)), printable_text(setting_text(other))]
        for place, one, other in changed
    ]
    return rows or [["no difference", "", ""]]


Facts = dict[str, dict[str, list[LoadedRun]]]
"""Fact → its value as text → the runs that have it."""

SAME_FOR_ALL = ("training data", "validation data", "device", "threads", "processes", "python")
"""Beside the versions: what must be the same for runs to be compared."""


VERSION = "version of "


def facts_of_runs(data: ExperimentData) -> Facts:
    """Return what ``run.json`` says of every run that has begun."""
    facts: Facts = defaultdict(lambda: defaultdict(list))
    for run in data.experiment.runs:
        if run.record:
            for name, value in _facts_of_record(run.record):
                facts[name][value].append(run)
    return facts


def _facts_of_record(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    data = record.get("data", {})
    for name, split in (("training data", "train"), ("validation data", "validation")):
        yield name, _split_text(data.get(split, {}))
    for name in ("duplicates_in_train", "duplicates_across", "contaminated"):
        if name in data:
            yield name.replace("_", " "), str(data[name])
    yield "device", str(record.get("device", "–"))
    yield "threads", str(record.get("threads", "–"))
    yield "processes", str(record.get("world_size", "–"))
    yield "python", str(record.get("python", "–"))
    yield "platform", str(record.get("platform", "–"))
    for name, version in record.get("versions", {}).items():
        yield VERSION + name, str(version)


def _split_text(split: Mapping[str, Any]) -> str:
    return f"{split.get('examples', '–')} examples, sha256 {str(split.get('sha256', '–'))[:HASH]}"


def uneven_facts(data: ExperimentData) -> dict[str, dict[str, list[LoadedRun]]]:
    """Return what should be the same in all runs and is not: values, and the runs that have them."""
    uneven = {}
    for name, values in facts_of_runs(data).items():
        if _should_be_same(name) and len(values) > 1:
            uneven[name] = values
    return uneven


def _should_be_same(name: str) -> bool:
    return name in SAME_FOR_ALL or name.startswith(VERSION)


def _text_of_values(values: Mapping[str, list[LoadedRun]]) -> str:
    """Return every value with the runs that have it; the commonest comes first."""
    by_frequency = sorted(values.items(), key=lambda item: -len(item[1]))
    (commonest, commonest_runs), *others = by_frequency
    texts = [f"{commonest} in {count_text(len(commonest_runs), 'run')}"]
    texts += [f"{value} in {_text_of_runs(runs)}" for value, runs in others]
    return "; ".join(texts)


def _text_of_runs(runs: list[LoadedRun]) -> str:
    seeds_by_variant: dict[str, list[int]] = defaultdict(list)
    for run in runs:
        seeds_by_variant[run.variant].append(run.seed)
    texts = [f"{variant} ({number_ranges(seeds)})" for variant, seeds in seeds_by_variant.items()]
    omitted = len(texts) - MOST_VARIANTS
    more = f" and {omitted} more variants" if omitted > 0 else ""
    return ", ".join(texts[:MOST_VARIANTS]) + more


def _facts_block(data: ExperimentData) -> Block:
    facts = facts_of_runs(data)
    if not facts:
        return Paragraph("No run has begun: nothing is known of data, machine and versions.")
    rows: list[list[str]] = []
    versions: Facts = {}
    for name, values in facts.items():
        if name.startswith(VERSION):
            versions[name] = values
        else:
            rows.append([name, printable_text(_fact_text(values))])
    rows.append(["versions", printable_text(_versions_text(versions))])
    rows.append(["seeds", number_ranges(data.experiment.seeds)])
    return PageTable("Data, machine, versions", ["of all runs that have begun", ""], rows, texts=(1,))


def _fact_text(values: Mapping[str, list[LoadedRun]]) -> str:
    return _text_of_values(values) if len(values) > 1 else next(iter(values))


def _versions_text(versions: Facts) -> str:
    texts = (f"{name.removeprefix(VERSION)} {' / '.join(values)}" for name, values in versions.items())
    return ", ".join(texts) or "–"
