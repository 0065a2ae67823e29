"""``kava profile``: every variant of a spec side by side, before any training."""

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
from kava_core.jobs.profile.picture import draw
from kava_core.jobs.profile.prepared import compares, refuse
from kava_core.jobs.profile.profile import Profile, Wanted, profile
from kava_core.jobs.profile.tables import show, show_verdict, side_by_side
from kava_core.jobs.profile.warnings import signs
from kava_core.json_files import write_json
from kava_core.paths import make_folder
from kava_core.runs.folder import LAYER_MAPS
from kava_core.specfile.load import LoadedSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.specfile.variants import MAIN, resolve_variants


def profile_all(
    loaded: LoadedSpec, folder: Path | None, wanted: Wanted, format: Literal["table", "json"]
) -> None:
    """Print every declared variant that compares a teacher's cache; controls are left out.

    With ``folder`` also ``profile.json``, ``profile.png`` and the layer maps measured go there.

    Raises:
        SpecError: no variant compares a teacher's cache; latent tokens, a store or placed teachers.
        KavaError: the folder cannot be written.
    """
    chosen = {name: spec for name, spec in _declared(loaded).items() if compares(spec)}
    if not chosen:
        raise SpecError("kava profile: no variant compares a teacher's cache; it needs a loss of weight > 0")
    for spec in chosen.values():
        refuse(spec)
    if folder is not None:
        make_folder(folder)
    console = Console(stderr=format == "json")
    with TemporaryDirectory() as scratch:
        found = _profiled(loaded, chosen, (folder or Path(scratch)) / LAYER_MAPS, wanted)
    wrong = {name: signs(one) for name, one in found.items()}
    plain = {name: one.json(wrong[name]) for name, one in found.items()}
    if format == "json":
        print(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        _print(found, wrong, console)
    if folder is not None:
        write_json(folder / "profile.json", plain)
        _picture(found, folder / "profile.png", loaded.spec.name, console)


def _declared(loaded: LoadedSpec) -> dict[str, PipelineSpec]:
    wanted = loaded.spec.variants or (MAIN,)
    return {name: spec for name, spec in resolve_variants(loaded).items() if name in wanted}


def _profiled(
    loaded: LoadedSpec, chosen: Mapping[str, PipelineSpec], maps: Path, wanted: Wanted
) -> dict[str, Profile]:
    found = {}
    with quiet():
        for name, spec in chosen.items():
            found[name] = profile(spec, loaded.registry, maps / name, wanted)
            gc.collect()  # models of one variant at a time
    return found


def _print(found: Mapping[str, Profile], wrong: Mapping[str, list[str]], console: Console) -> None:
    for name, one in found.items():
        show(name, one, console)
    print_whole(side_by_side(found), console)
    for name, lines in wrong.items():
        show_verdict(name, lines, console)


def _picture(found: Mapping[str, Profile], path: Path, name: str, console: Console) -> None:
    if draw(found, path, title=f"{name}: before training"):
        console.print(f"profile: {path.with_suffix('.json')}, {path}", soft_wrap=True)
    else:
        console.print("no picture: matplotlib is not installed (pip install 'kava[plots]')")
