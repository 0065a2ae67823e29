"""List the distributions that decide what a run computes, and their versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, entry_points, version

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
    """Return ``distribution version`` of the plugin that a module belongs to, None if it belongs to none.

    Entry points are asked, not ``packages_distributions``, which knows no editable installs.
    """
    package = module.partition(".")[0]
    for point in entry_points(group="kava"):
        if point.module.partition(".")[0] == package and point.dist is not None:
            return f"{point.dist.name} {point.dist.version}"
    return None
