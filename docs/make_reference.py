"""Writes docs/components.md and docs/spec.md from the declarations: ``python docs/make_reference.py``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kava_core import hookspecs
from kava_core.config import ComponentConfig
from kava_core.hookspecs import KINDS
from kava_core.registry import Registry
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.specfile.sections.rules import RULES

DOCS = Path(__file__).parent
NOTE = "This page is written by `python docs/make_reference.py`; edit the declarations instead.\n"
ABOUT_COMPONENTS = """\
`kava plugins` lists what is installed, third parties included. A component is written as its name, or as a
mapping with its name and parameters: `{name: linear, share_heads: false}`.
"""

ABOUT_SPECS = """\
A spec is YAML, read strictly: no anchors, tags or duplicate keys; `1e-4` is a number; an unknown key is an
error with a suggestion. `kava check SPEC` checks it, `kava schema` writes its JSON Schema for editors.
Trailing `key=value` arguments change single fields: `kava train spec.yaml train.steps=100`.
"""

ABOUT_RULES = """\
What may go together in a spec, across its blocks. The first rule that a spec breaks is its error.
`kava check --rules` prints this table.
"""

COMPONENTS = {"ComponentConfig": "component", "KVLossConfig": "KV loss"}
"""Models that spec.md does not describe, because components.md does."""

BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}
PLAIN = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`"}
Schema = dict[str, Any]


def components() -> str:
    """The page about every built-in component."""
    registry = Registry.build(disabled={"*"})
    parts = [
        "# Components\n",
        NOTE,
        ABOUT_COMPONENTS,
    ]
    for kind, hook in KINDS.items():
        summary = (inspect.getdoc(getattr(hookspecs, hook)) or "").partition("\n")[0]
        parts += [f"## {kind}\n", f"{text(summary)}\n"]
        parts += [part for config in registry.configs(kind) for part in component(config)]
    return "\n".join(parts)


def component(config: type[ComponentConfig]) -> Iterator[str]:
    """Heading, description and parameters of one component, and of the mappings inside it."""
    schema = config.model_json_schema()
    yield f"### {config.component_name()}\n"
    yield f"{text(inspect.getdoc(config) or '')}\n"
    yield from fields(schema, without=("name",))
    for name, inner in schema.get("$defs", {}).items():
        yield f"#### {name}\n"
        yield f"{text(inner['description'])}\n"
        yield from fields(inner)


def spec() -> str:
    """The page about every field of a spec."""
    schema = PipelineSpec.model_json_schema()
    parts = ["# Spec files\n", NOTE, ABOUT_SPECS, *section("PipelineSpec", schema)]
    for name in reachable(schema):
        if name not in COMPONENTS:
            parts += section(name, schema["$defs"][name])
    return "\n".join([*parts, *rules()])


def rules() -> Iterator[str]:
    """Render the table of what may go together."""
    yield "## Rules\n"
    yield ABOUT_RULES
    rows = [f"| `{rule.name}` | {rule.when} | {rule.what} |" for rule in RULES]
    yield "\n".join(["| rule | when | what must be so then |", "|---|---|---|", *rows]) + "\n"


def section(name: str, schema: Schema) -> Iterator[str]:
    """Heading, description and fields of one model of the spec."""
    yield f"## {name}\n"
    yield f"{text(schema['description'])}\n"
    yield from fields(schema)


def reachable(schema: Schema) -> list[str]:
    """Names of the models below, in the order in which they are met."""
    found: dict[str, None] = {}
    queue = [schema]
    while queue:
        for name in _references(queue.pop(0)):
            if name not in found:
                found[name] = None
                queue.append(schema["$defs"][name])
    return list(found)


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        for key, inner in node.items():
            if key not in ("$defs", "discriminator", "default"):
                yield from _references(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from _references(inner)


def fields(schema: Schema, without: tuple[str, ...] = ()) -> Iterator[str]:
    """A table of the fields; a sentence where there are none."""
    rows = [row(name, field, schema) for name, field in schema["properties"].items() if name not in without]
    if rows:
        yield "\n".join(["| field | value | default | meaning |", "|---|---|---|---|", *rows]) + "\n"
    else:
        yield "No parameters.\n"


def row(name: str, field: Schema, schema: Schema) -> str:
    """One line of the table."""
    required = name in schema.get("required", [])
    default = "required" if required else value(field.get("default"), model="$ref" in field)
    cells = (f"`{name}`", kind(field), default, " ".join(text(meaning(field, schema)).split()))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def meaning(field: Schema, schema: Schema) -> str:
    """The field's docstring; pydantic leaves it out where it equals that of the field's class."""
    inner = schema.get("$defs", {}).get(field.get("$ref", "").rpartition("/")[2], {})
    return str(field.get("description", inner.get("description", "")))


def text(docstring: str) -> str:
    """Return a docstring as Markdown: one backtick for two, labels in bold, papers as links."""
    markdown = docstring.replace("``", "`")
    markdown = re.sub(r"^(Formula|Source):", r"**\1:**", markdown, flags=re.MULTILINE)
    return re.sub(r"\barXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", markdown)


def value(default: Any, *, model: bool) -> str:
    """A default as a spec would say it."""
    if default is None or (default == {} and not model):
        return "none"
    if isinstance(default, dict):
        return f"`{default['name']}`" if set(default) == {"name"} else "its defaults"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, list | tuple):
        return f"`[{', '.join(map(str, default))}]`"
    return "`" + str(default).replace("\n", "\\n") + "`"


def kind(field: Schema) -> str:
    """What may be written in a field, in words."""
    if "$ref" in field:
        return link(field["$ref"].rpartition("/")[2])
    options = field.get("anyOf") or field.get("oneOf")
    if options:
        return ", or ".join(dict.fromkeys(kind(option) for option in options if option.get("type") != "null"))
    if "const" in field or "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field.get("enum", [field.get("const")]))
    if "prefixItems" in field:
        return "always " + ", ".join(kind(item) for item in field["prefixItems"])
    if field.get("type") == "array":
        return f"list of {kind(field['items'])}" + (", not empty" if field.get("minItems") else "")
    if field.get("type") == "object":
        return mapping(field)
    return ", ".join([PLAIN.get(field.get("type", ""), "anything"), *constraints(field)])


def mapping(field: Schema) -> str:
    """A mapping with free keys."""
    inner = field.get("additionalProperties")
    choices = field.get("propertyNames", {}).get("enum")
    keys = f" from {', '.join(f'`{key}`' for key in choices)}" if choices else ""
    return f"mapping{keys}" + (f" to {kind(inner)}" if isinstance(inner, dict) else "")


def constraints(field: Schema) -> Iterator[str]:
    """Bounds and patterns in words."""
    yield from (f"{word} {field[bound]:g}" for bound, word in BOUNDS.items() if bound in field)
    if "pattern" in field:
        yield f"matching `{field['pattern']}`"
    if "maxLength" in field:
        yield f"at most {field['maxLength']} characters"


def link(name: str) -> str:
    """A link to the section of a model."""
    return f"[{COMPONENTS[name]}](components.md)" if name in COMPONENTS else f"[{name}](#{name.lower()})"


PAGES = {"components.md": components, "spec.md": spec}

if __name__ == "__main__":
    for page, write in PAGES.items():
        (DOCS / page).write_text(write(), encoding="utf-8")
