"""Prove that a spec is right, level by level, each more expensive than the one before: ``kava check``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path as File

from kava_core.errors import KavaError, PluginError
from kava_core.specfile.load import LoadedSpec, load_spec, read_document
from kava_core.specfile.questions import used_components
from kava_core.specfile.sections.data import ChainData, change_data
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.specfile.sections.rules import RULES
from kava_core.specfile.variants import resolve_variants

Level = tuple[str, str]
"""Name of a level that passed, and what it found."""


def check(file: str | File, overrides: Sequence[str] = ()) -> Iterator[Level]:
    """Run the levels in order, yielding each as it passes; the error of the first that does not."""
    read_document(file, overrides)
    yield "syntax", "strict YAML"
    loaded = load_spec(file, overrides)
    variants = resolve_variants(loaded)
    check_chains(variants)
    yield "schema", _counted(loaded, variants)
    yield "rules", f"{len(RULES)} rules hold"
    yield "plugins", _imported(loaded, variants)
    yield "shapes", dry_runs(variants)


def rule_lines() -> list[str]:
    """Return the table of rules as lines of three columns: name, when it applies, what must be so then."""
    rows = [("RULE", "WHEN", "WHAT MUST BE SO THEN")]
    rows += [(rule.name, rule.when, rule.what) for rule in RULES]
    name_width = max(len(name) for name, _, _ in rows)
    when_width = max(len(when) for _, when, _ in rows)
    return [f"{name:<{name_width}}  {when:<{when_width}}  {what}" for name, when, what in rows]


def check_chains(variants: dict[str, PipelineSpec]) -> None:
    """Raise SpecError if fewer chains exist than the run, or a model to be pretrained, asks for."""
    from kava_core.data.chain import check_enough_chains

    for spec in variants.values():
        plans = (m.pretrain for m in (spec.student, *spec.teachers))
        for data in (spec.data, *(change_data(spec.data, plan.data) for plan in plans if plan is not None)):
            if isinstance(data, ChainData):
                check_enough_chains(data)


def dry_runs(variants: dict[str, PipelineSpec]) -> str:
    """Align, fuse and compare meta tensors for every variant."""
    from kava_core.costs.dry_run import dry_run
    from kava_core.kv.align.boundaries import attribute_errors_to

    runs = []
    for name, spec in variants.items():
        with attribute_errors_to(f"variant {name!r}") if len(variants) > 1 else nullcontext():
            runs.append(dry_run(spec, batch=2, time=24, t_time=30))
    teachers = {name: geometry for run in runs for name, geometry in run.teachers.items()}
    return "; ".join(
        [f"student: {runs[0].student}", *(f"{name}: {found}" for name, found in teachers.items())]
    )


def _counted(loaded: LoadedSpec, variants: dict[str, PipelineSpec]) -> str:
    return f"variants: {', '.join(variants)}; seeds: {', '.join(map(str, loaded.spec.seeds))}"


def _imported(loaded: LoadedSpec, variants: dict[str, PipelineSpec]) -> str:
    """Import the implementations of everything used; PluginError at the first that cannot be."""
    used = [one for spec in variants.values() for one in used_components(spec)]
    names = dict.fromkeys((kind, config.component_name()) for kind, config in used)
    for kind, name in names:
        _import(loaded, kind, name)
    return f"imported: {', '.join(f'{kind} {name}' for kind, name in names) or 'no component is used'}"


def _import(loaded: LoadedSpec, kind: str, name: str) -> None:
    try:
        loaded.registry.get(kind, name).implementation()
    except Exception as error:
        told = str(error) if isinstance(error, KavaError) else f"{type(error).__name__}: {error}"
        origin = loaded.registry.origin(kind, name)
        raise PluginError(f"{kind} {name!r} ({origin}): {' '.join(told.split())}") from error
