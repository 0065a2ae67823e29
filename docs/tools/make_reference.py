"""Write the pages of docs/reference from the code: ``python docs/tools/make_reference.py``."""

from __future__ import annotations

import inspect
import re
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from kava_core import errors, hookspecs
from kava_core.cli.app import app
from kava_core.config import ComponentConfig
from kava_core.hookspecs import KINDS
from kava_core.registry import Registry
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.specfile.sections.rules import RULES

PAGES_FOLDER = Path(__file__).parents[1] / "reference"
NOTE = "This page is written by `python docs/tools/make_reference.py`; edit the code it describes instead.\n"
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

ABOUT_COMMANDS = """\
`kava train specs/quickstart.yaml train.steps=100` trains what a spec describes, for 100 steps. Most verbs
take a spec, then changes of single fields as `KEY=VALUE`, then options. `kava VERB --help` prints the same.
"""

ABOUT_EXIT_CODES = """\
`kava check broken.yaml; echo $?` prints a line for every mistake, then 2. Scripts can act on these codes.
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


def commands() -> str:
    """Return the page about every verb of the command line."""
    parts = ["# Command line\n", NOTE, ABOUT_COMMANDS, *exit_codes()]
    parts += [
        "## Options of every verb\n",
        "They come before the verb: `kava --traceback train mine.yaml`.\n",
    ]
    parts += parameter_table(app.registered_callback.callback)
    for name, verb in verbs():
        parts += [f"## kava {name}\n", f"{text(inspect.getdoc(verb) or '')}\n"]
        parts += [f"```text\n{usage(name, verb)}\n```\n", *parameter_table(verb)]
    return "\n".join(parts)


def exit_codes() -> Iterator[str]:
    """Render the table of exit codes, from the docstrings of kava's errors."""
    meanings: dict[int, list[str]] = defaultdict(list, {0: ["Done."]})
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.KavaError):
            meanings[error.exit_code].append((inspect.getdoc(error) or "").partition("\n")[0])
    yield "## Exit codes\n"
    yield ABOUT_EXIT_CODES
    rows = [f"| {code} | {text(' '.join(meanings[code]))} |" for code in sorted(meanings)]
    yield "\n".join(["| code | meaning |", "|---|---|", *rows]) + "\n"


def verbs() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield every verb as it is typed, and its function; those of a group after the others."""
    for command in app.registered_commands:
        yield command.name or command.callback.__name__, command.callback
    for group in app.registered_groups:
        for command in group.typer_instance.registered_commands:
            yield f"{group.name} {command.name}", command.callback


def parameters(verb: Callable[..., Any]) -> Iterator[tuple[str, Any, Any, ArgumentInfo | OptionInfo]]:
    """Yield name, type, default and typer's declaration of every parameter of a verb."""
    hints = get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        hint, *declarations = get_args(hints[name])
        [declaration] = [one for one in declarations if isinstance(one, ArgumentInfo | OptionInfo)]
        yield name, hint, parameter.default, declaration


def usage(name: str, verb: Callable[..., Any]) -> str:
    """Return the line that shows how a verb is typed."""
    words = []
    for _, hint, default, declaration in parameters(verb):
        if isinstance(declaration, ArgumentInfo):
            many = " …" if list in (get_origin(hint), *map(get_origin, get_args(hint))) else ""
            required = default is inspect.Parameter.empty
            words.append(f"{declaration.metavar}{many}" if required else f"[{declaration.metavar}{many}]")
    return " ".join(["kava", name, *words, "[OPTIONS]"])


def parameter_table(verb: Callable[..., Any]) -> Iterator[str]:
    """Render the arguments and options of a verb."""
    rows = []
    for name, hint, default, declaration in parameters(verb):
        spelling = declaration.metavar or name
        if isinstance(declaration, OptionInfo):
            spelling = ", ".join(declaration.param_decls or [f"--{name.replace('_', '-')}"])
        cells = (f"`{spelling}`", words_for_type(hint, declaration), default_words(default), declaration.help)
        rows.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    if rows:
        header = ["| argument or option | value | default | meaning |", "|---|---|---|---|"]
        yield "\n".join([*header, *rows]) + "\n"


def words_for_type(hint: Any, declaration: ArgumentInfo | OptionInfo) -> str:
    """Return in words what may be given for a parameter."""
    choices = [one for one in get_args(hint) if one is not type(None)]
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in choices)
    if get_origin(hint) in (Union, types.UnionType):
        return words_for_type(choices[0], declaration)
    if get_origin(hint) is list:
        return f"any number of {words_for_type(choices[0], declaration)}"
    if hint is bool:
        return "a switch"
    word = {int: "whole number", float: "number", Path: "path"}.get(hint, "text")
    return f"{word}, at least {declaration.min:g}" if declaration.min is not None else word


def default_words(default: Any) -> str:
    """Return the default of a parameter as the command line would take it."""
    if default is inspect.Parameter.empty:
        return "required"
    if default in (None, "", False):
        return "none" if default is not False else "off"
    return f"`{default}`"


PAGES = {"components.md": components, "spec.md": spec, "cli.md": commands}

if __name__ == "__main__":
    for page, write in PAGES.items():
        (PAGES_FOLDER / page).write_text(write(), encoding="utf-8")
