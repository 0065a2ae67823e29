"""Check whether a component's declaration is usable in a spec, for the registry and the conformance kit."""

from __future__ import annotations

import re
from inspect import isclass
from typing import Any, Literal, get_args, get_origin

from kava_core.config import ComponentConfig, KVLossConfig

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def base_class_of_kind(kind: str) -> type[ComponentConfig]:
    """Return the class that declarations of this kind derive from."""
    return KVLossConfig if kind == "kv_loss" else ComponentConfig


METRIC_NAMES = (
    "loss",
    "ce",
    "perplexity",
    "exact_match",
    "labelled",
    "tokens",
    "step",
    "seconds",
    "epoch",
    "router",
    "aux_loss",
)
"""Names of metrics, which no loss may have: its values would replace theirs."""


def declaration_fault(kind: str, declaration: Any) -> str | None:
    """Return the first thing wrong with a declaration, as a sentence; None if it is usable."""
    base = base_class_of_kind(kind)
    if not isclass(declaration) or not issubclass(declaration, base) or declaration is base:
        return f"{declaration!r} is not a subclass of {base.__name__}"
    subject = f"class {declaration.__name__}"
    if not _has_literal_name(declaration):
        return f"{subject} needs a field like name: Literal['my_name'] = 'my_name' (lower case, digits, _)"
    if kind == "kv_loss" and declaration.component_name() in METRIC_NAMES:
        return f"{subject}: {declaration.component_name()!r} is the name of a metric; choose another name"
    if not _IMPORT_PATH.fullmatch(str(getattr(declaration, "component", ""))):
        given = getattr(declaration, "component", None)
        return f"{subject} needs component = 'package.module:Class', not {given!r}"
    if not (declaration.__dict__.get("__doc__") or "").strip():
        return f"{subject} needs a docstring; it is shown by 'kava plugins'"
    return None


def _has_literal_name(declaration: type[ComponentConfig]) -> bool:
    field = declaration.model_fields["name"]
    is_literal = get_origin(field.annotation) is Literal and get_args(field.annotation) == (field.default,)
    return is_literal and bool(_NAME.fullmatch(str(field.default)))
