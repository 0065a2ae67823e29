"""Write a package with one component, its declaration, its test and its entry point."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from kava_core.declarations import RESERVED
from kava_core.errors import KavaError, SpecError, did_you_mean, one_of
from kava_core.hookspecs import KINDS
from kava_core.registry import Registry

TEMPLATES = Path(__file__).parent / "templates"

NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
"""Lower-case words of letters and digits, joined by ``-`` or ``_``."""

TAKEN = ("component", "literal", "component_config", "core", "plugins")
"""Names the generated files or kava itself need."""


def write_plugin(name: str, kind: str, output: Path) -> Path:
    """Write the package and return its folder, ``output/kava-NAME``.

    Raises:
        SpecError: the kind does not exist, the name is no name, or the component exists.
        KavaError: the folder exists or cannot be written.
    """
    words = _template_words(name, kind)
    folder = output / words["distribution"]
    files = _texts_of_files(words, kind)
    try:
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    except FileExistsError as error:
        raise KavaError(f"{folder}: exists already; choose another name or --output") from error
    except OSError as error:
        raise KavaError(f"{folder}: cannot be written: {error.strerror}") from error
    return folder


def _template_words(name: str, kind: str) -> dict[str, str]:
    """Return the words that fill the templates."""
    if kind not in KINDS:
        raise SpecError(f"no kind {kind!r}; possible: {one_of(KINDS)}{did_you_mean(kind, KINDS)}")
    if not NAME.fullmatch(name):
        raise SpecError(f"name {name!r}: must be lower-case letters and digits, joined by '-' or '_'")
    component = name.replace("-", "_").removeprefix("kava_")
    _check_name_free(component, kind)
    return {
        "component": component,
        "distribution": f"kava-{component}".replace("_", "-"),
        "package": f"kava_{component}",
        "declaration": "".join(word.capitalize() for word in component.split("_")),
        "kind": kind,
        "said": kind.replace("_", " "),
        "module": kind.rpartition("_")[2],
        "suffix": kind.rpartition("_")[2].capitalize(),
        "hook": KINDS[kind],
        "base": "KVLossConfig" if kind == "kv_loss" else "ComponentConfig",
        "kit": "".join("KV" if word == "kv" else word.capitalize() for word in kind.split("_")) + "Tests",
        "use": _line_of_spec(kind, component),
    }


def _check_name_free(component: str, kind: str) -> None:
    reserved = (*TAKEN, *RESERVED) if kind == "kv_loss" else TAKEN
    if component in reserved:
        raise SpecError(f"name {component!r}: is reserved; choose another name")
    registry = Registry.build()
    if component in registry.names(kind):
        owner = registry.origin(kind, component)
        raise SpecError(f"{kind} {component!r} is registered by {owner}; choose another name")


def _line_of_spec(kind: str, component: str) -> str:
    """Return the line of a spec that names the component."""
    if kind == "kv_loss":
        return f"losses: [{component}]"
    return f"fuser: {component}" if kind == "fuser" else f"align: {{{kind}: {component}}}"


def _texts_of_files(words: dict[str, str], kind: str) -> dict[str, str]:
    """Return the text of every file by its path in the package's folder."""
    package = words["package"]
    templates = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{package}/__init__.py": "declaration.py",
        f"{package}/{words['module']}.py": f"{kind}.py",
        f"tests/test_{words['component']}.py": "test.py",
    }
    return {path: _filled_template(template, words) for path, template in templates.items()}


def _filled_template(template: str, words: dict[str, str]) -> str:
    text = (TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")
    return Template(text).substitute(words)
