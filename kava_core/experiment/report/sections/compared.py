"""What was compared with what: specs, data, machines, versions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from kava_core.experiment.gather import Run
from kava_core.experiment.report.experiment_data import Found
from kava_core.experiment.report.pages.blocks import Block, Paragraph, Section, Table
from kava_core.experiment.report.pages.text import counted, listed, plain

SAME_ANYWAY = ("name", "variants", "seeds", "compare", "output")
"""Settings that say nothing about a single run."""

HASH = 12
"""Characters of a hash that are shown."""

ABSENT = object()
"""Stands for a setting that one spec does not have."""


def compared(found: Found) -> Section:
    """Specs as differences from the treatment's; data, versions and machines."""
    blocks: list[Block] = [
        Paragraph(plain(f"Runs differ in {name}: {_who(values)}."), "warning")
        for name, values in uneven(found).items()
    ]
    blocks += [_settings(found), _facts(found)]
    return Section("compared", "What was compared", blocks)


Difference = tuple[str, Any, Any]
"""Dotted path, the value here, the value there."""


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """Wherever two specs differ, as deep as they have the same shape and the same component."""
    sides = [{k: v for k, v in spec.items() if k not in SAME_ANYWAY} for spec in (one, other)]
    return list(_differences("", *sides))


def _differences(at: str, one: Any, other: Any) -> Iterator[Difference]:
    if _alike(one, other):
        pairs = _pairs(one, other)
        for name, first, second in pairs:
            yield from _differences(f"{at}.{name}" if at else name, first, second)
    elif one is ABSENT or other is ABSENT or one != other:
        yield at, one, other


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return bool(one.get("name") == other.get("name"))
    both = isinstance(one, list) and isinstance(other, list) and len(one) == len(other)
    return both and all(isinstance(item, Mapping) for item in (*one, *other))


def _pairs(one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, list):
        yield from ((str(place), *both) for place, both in enumerate(zip(one, other, strict=True)))
    else:
        for name in dict.fromkeys([*one, *other]):
            yield name, one.get(name, ABSENT), other.get(name, ABSENT)


def shown(value: Any) -> str:
    """A setting in a line: a component by its name, then its fields."""
    if value is ABSENT:
        return "–"
    if isinstance(value, Mapping):
        fields = ", ".join(f"{name} {shown(inner)}" for name, inner in value.items() if name != "name")
        named = f"{value['name']} " if "name" in value else ""
        return f"{named}({fields})" if fields else named.strip() or "{}"
    if isinstance(value, list):
        return "; ".join(map(shown, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _settings(found: Found) -> Block:
    base = found.specs.get(found.treatment)
    if base is None:
        said = f"No run of {found.treatment} has begun, so specs cannot be set against its spec."
        return Paragraph(plain(said))
    others = [variant for variant in found.experiment.variants if variant != found.treatment]
    rows = [[plain(variant), *row] for variant in others for row in _changes(found, base, variant)]
    if not rows:
        return Paragraph("There is no second variant whose spec could differ.")
    head = ["variant", "setting", plain(found.treatment), "this variant"]
    return Table(
        plain(f"Settings that differ from those of {found.treatment}"), head, rows, left=2, texts=(2, 3)
    )


def _changes(found: Found, base: Mapping[str, Any], variant: str) -> list[list[str]]:
    if variant not in found.specs:
        return [["no run has begun", "", ""]]
    changed = difference(base, found.specs[variant])
    rows = [[plain(place), plain(shown(one)), plain(shown(other))] for place, one, other in changed]
    return rows or [["no difference", "", ""]]


Facts = dict[str, dict[str, list[Run]]]
"""Fact → its value as text → the runs that have it."""

WARNED = ("training data", "validation data", "device", "threads", "processes", "python")
"""Beside the versions: what must be the same for runs to be compared."""


VERSION = "version of "


def facts(found: Found) -> Facts:
    """What ``run.json`` says of every run that has begun."""
    gathered: Facts = defaultdict(lambda: defaultdict(list))
    for run in found.experiment.runs:
        for name, value in _facts_of(run.record) if run.record else ():
            gathered[name][value].append(run)
    return gathered


def _facts_of(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    data = record.get("data", {})
    for name, split in (("training data", "train"), ("validation data", "validation")):
        yield name, _split(data.get(split, {}))
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


def _split(split: Mapping[str, Any]) -> str:
    return f"{split.get('examples', '–')} examples, sha256 {str(split.get('sha256', '–'))[:HASH]}"


def uneven(found: Found) -> dict[str, dict[str, list[Run]]]:
    """What should be the same in all runs and is not: values, and the runs that have them."""
    watched = {name: values for name, values in facts(found).items() if _is_watched(name)}
    return {name: values for name, values in watched.items() if len(values) > 1}


def _is_watched(name: str) -> bool:
    return name in WARNED or name.startswith(VERSION)


def _who(values: Mapping[str, list[Run]]) -> str:
    """Every value with the runs that have it; the commonest comes first."""
    ordered = sorted(values.items(), key=lambda item: -len(item[1]))
    first, rest = ordered[0], ordered[1:]
    told = [f"{value} in {_runs(runs)}" for value, runs in rest]
    return "; ".join([f"{first[0]} in {counted(len(first[1]), 'run')}", *told])


def _runs(runs: list[Run]) -> str:
    by_variant: dict[str, list[int]] = defaultdict(list)
    for run in runs:
        by_variant[run.variant].append(run.seed)
    names = [f"{variant} ({listed(those)})" for variant, those in by_variant.items()]
    more = f" and {len(names) - 4} more variants" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _facts(found: Found) -> Block:
    known = facts(found)
    if not known:
        return Paragraph("No run has begun: nothing is known of data, machine and versions.")
    rows = [[name, plain(_fact(values))] for name, values in known.items() if not name.startswith(VERSION)]
    versions = {name: values for name, values in known.items() if name.startswith(VERSION)}
    rows += [["versions", plain(_versions(versions))], ["seeds", listed(found.experiment.seeds)]]
    return Table("Data, machine, versions", ["of all runs that have begun", ""], rows, texts=(1,))


def _fact(values: Mapping[str, list[Run]]) -> str:
    return _who(values) if len(values) > 1 else next(iter(values))


def _versions(versions: Facts) -> str:
    told = (f"{name.removeprefix(VERSION)} {' / '.join(values)}" for name, values in versions.items())
    return ", ".join(told) or "–"
