"""List the distributions that decide what a run computes, their versions, and the code of plugins."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path, PurePath
from urllib.parse import unquote, urlparse

from kava_core.errors import PluginError
from kava_core.files import file_hash

LIBRARIES = (
    *("kava", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "peft"),
    *("datasets", "pydantic", "pluggy", "einops", "jaxtyping", "beartype", "pyyaml", "typer"),
)


def versions() -> dict[str, str | None]:
    """Return the version of every library, None for one that is not installed."""
    return {name: version_of(name) for name in LIBRARIES}


def version_of(distribution: str) -> str | None:
    """Return a distribution's version, None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def distributor(module: str) -> str | None:
    """Return ``distribution version`` of the plugin that a module belongs to, None if it belongs to none."""
    distribution = distribution_of(module)
    return None if distribution is None else f"{distribution.name} {distribution.version}"


def distribution_of(module: str) -> Distribution | None:
    """Return the distribution of the plugin that a module belongs to, None if it belongs to none.

    Entry points are asked, not ``packages_distributions``, which knows no editable installs.
    """
    return _plugins_on(tuple(sys.path)).get(module.partition(".")[0])


@cache
def _plugins_on(path: tuple[str, ...]) -> dict[str, Distribution]:
    """Return the distribution of every plugin that is installed, by its package.

    Args:
        path: ``sys.path``; reading it takes a hundredth of a second.
    """
    plugins: dict[str, Distribution] = {}
    for point in entry_points(group="kava"):
        if point.dist is not None:
            plugins.setdefault(point.module.partition(".")[0], point.dist)
    return plugins


NOT_CODE = (".pyc", ".pyo", ".pth", "~")
"""Ends of the names of files that do not decide what a plugin computes."""
METADATA = (".dist-info", ".egg-info")
"""Ends of the names of folders in which installers keep their notes."""


def plugin_code_hash(distribution: Distribution | None, modules: Iterable[str]) -> str:
    """Return the sha256 of the names and contents of a plugin's files, byte code left out.

    These are the files that the installer recorded, and all files of the packages that the modules are in.
    Of an editable install with a folder such as ``src`` all of that folder counts.

    Args:
        distribution: of the plugin; None: nothing was recorded.
        modules: modules of the plugin; they are found but not imported.

    Raises:
        PluginError: a file cannot be read.
    """
    files = dict(_recorded_files(distribution)) if distribution is not None else {}
    project = _editable_project(distribution)
    for module in sorted(set(modules)):
        files |= _files_of_package(module, project)
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        try:
            digest.update(f"{file_hash(file)} {name}\n".encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise PluginError(f"{file}: a plugin's file cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _recorded_files(distribution: Distribution) -> Iterator[tuple[str, Path]]:
    """Yield name and place of every file that the installer recorded and that is code or data of the
    plugin."""
    for recorded in distribution.files or ():
        file = Path(str(recorded.locate()))
        if _is_plugin_file(recorded) and file.is_file():
            yield recorded.as_posix(), file


def _is_plugin_file(name: PurePath) -> bool:
    """Return whether a file of this name, relative to where packages are, counts as part of a plugin."""
    if name.name.endswith(NOT_CODE):
        return False
    return not any(
        part.startswith((".", "__editable__")) or part == "__pycache__" or part.endswith(METADATA)
        for part in name.parts
    )


def _editable_project(distribution: Distribution | None) -> Path | None:
    """Return the project's folder of an editable install, None of any other (PEP 610)."""
    try:
        origin = json.loads((distribution and distribution.read_text("direct_url.json")) or "{}")
        if not origin["dir_info"]["editable"]:
            return None
        return Path(unquote(urlparse(origin["url"]).path)).resolve()
    except (ValueError, KeyError, TypeError):
        return None


def _files_of_package(module: str, project: Path | None) -> dict[str, Path]:
    """Return name and place of the files of the package, or single file, that a module is in."""
    root = _import_root(module)
    if root is None:
        return {}
    name, spec = root
    if spec.submodule_search_locations is None:
        file = Path(str(spec.origin))
        return {name.replace(".", "/") + file.suffix: file} if file.is_file() else {}
    files: dict[str, Path] = {}
    for location in map(Path, spec.submodule_search_locations):
        base = location.resolve().parents[name.count(".")]
        holds_packages_alone = project is not None and base != project and base.is_relative_to(project)
        files |= _files_below(base if holds_packages_alone else location.resolve(), base)
    return files


def _files_below(folder: Path, base: Path) -> dict[str, Path]:
    """Return the files in a folder, named by their path from ``base``."""
    files: dict[str, Path] = {}
    for file in folder.rglob("*"):
        name = file.relative_to(base)
        if _is_plugin_file(name) and file.is_file():
            files[name.as_posix()] = file
    return files


def _import_root(module: str) -> tuple[str, ModuleSpec] | None:
    """Return the outermost package of a module that is no namespace, which distributions share.

    Returns:
        Its name and where it is; None if it cannot be found.
    """
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        name = ".".join(parts[:length])
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):  # as of __main__, which has none
            return None
        if spec is None:
            return None
        if spec.origin is not None:
            return name, spec
    return None
