"""Profile every variant of a spec side by side, before any training: ``kava profile``."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from rich.console import Console

from kava_core.console import print_whole, quiet
from kava_core.errors import SpecError
from kava_core.files import make_folder, write_json
from kava_core.jobs.profile.prepared_variant import check_can_profile, compares_caches
from kava_core.jobs.profile.profile_picture import draw_profiles
from kava_core.jobs.profile.profile_tables import print_profile, print_warnings, side_by_side_table
from kava_core.jobs.profile.profile_warnings import profile_warnings
from kava_core.jobs.profile.variant_profile import Profile, ProfileOptions, load_and_profile
from kava_core.runs.folder import LAYER_MAPS
from kava_core.specfile.load import LoadedSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.specfile.variants import MAIN, resolve_variants


def profile_variants(
    loaded: LoadedSpec, folder: Path | None, options: ProfileOptions, format: Literal["table", "json"]
) -> None:
    """Print every declared variant that compares a teacher's cache; controls are left out.

    Args:
        loaded: the spec.
        folder: gets ``profile.json``, ``profile.png`` and the layer maps measured; None: no files.
        options: how much is looked at.
        format: how to print.

    Raises:
        SpecError: no variant compares a teacher's cache; latent tokens, a store or placed teachers.
        KavaError: the folder cannot be written.
    """
    variants = _comparing_variants(loaded)
    if not variants:
        raise SpecError("kava profile: no variant compares a teacher's cache; it needs a loss of weight > 0")
    for spec in variants.values():
        check_can_profile(spec)
    if folder is not None:
        make_folder(folder)
    console = Console(stderr=format == "json")
    with TemporaryDirectory() as scratch:
        maps = (folder or Path(scratch)) / LAYER_MAPS
        profiles = _profile_each(loaded, variants, maps, options)
    warnings = {name: profile_warnings(profile) for name, profile in profiles.items()}
    plain = {name: profile.json(warnings[name]) for name, profile in profiles.items()}
    if format == "json":
        print(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        _print_profiles(profiles, warnings, console)
    if folder is not None:
        write_json(folder / "profile.json", plain)
        _draw_picture(profiles, folder / "profile.png", loaded.spec.name, console)


def _comparing_variants(loaded: LoadedSpec) -> dict[str, PipelineSpec]:
    """Return the variants that compare caches and that the spec itself declares, without controls."""
    declared = loaded.spec.variants or (MAIN,)
    variants = {}
    for name, spec in resolve_variants(loaded).items():
        if name in declared and compares_caches(spec):
            variants[name] = spec
    return variants


def _profile_each(
    loaded: LoadedSpec, variants: Mapping[str, PipelineSpec], maps: Path, options: ProfileOptions
) -> dict[str, Profile]:
    profiles = {}
    with quiet():
        for name, spec in variants.items():
            profiles[name] = load_and_profile(spec, loaded.registry, maps / name, options)
            gc.collect()  # models of one variant at a time
    return profiles


def _print_profiles(
    profiles: Mapping[str, Profile], warnings: Mapping[str, list[str]], console: Console
) -> None:
    for variant, profile in profiles.items():
        print_profile(variant, profile, console)
    print_whole(side_by_side_table(profiles), console)
    for variant, lines in warnings.items():
        print_warnings(variant, lines, console)


def _draw_picture(profiles: Mapping[str, Profile], path: Path, name: str, console: Console) -> None:
    if draw_profiles(profiles, path, title=f"{name}: before training"):
        console.print(f"profile: {path.with_suffix('.json')}, {path}", soft_wrap=True)
    else:
        console.print("no picture: matplotlib is not installed (pip install 'kava[plots]')")
