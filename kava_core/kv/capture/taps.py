"""Wrap the functions that transformers' attention calls, in place and once, so that tensors can be captured.

The wrappers keep their names, so a model's configuration and masks stay as they are, and they do nothing for
a module without a slot. A slot takes tensors by reference: arithmetic here would break recomputation under
gradient checkpointing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from kava_core.config import Part
from kava_core.errors import UnsupportedModelError
from kava_core.kv.capture.logit_rule import LogitRule, read_logit_rule
from kava_core.kv.capture.rotation import Angles

SLOT = "_kava_slot"
ROTATE = "apply_rotary_pos_emb"
EAGER = "eager_attention_forward"
TENSORS = ("module", "query", "key", "value")
"""First arguments of every attention function; others follow."""


class StopForward(Exception):
    """Raised to leave a forward pass early, once all that is wanted of it has been seen."""


class Rotated(NamedTuple):
    """One call of a model's rotation."""

    angles: Angles
    rows: int
    """Heads × positions of the keys."""
    before: tuple[Tensor, Tensor]
    """Queries and keys it was given."""
    after: tuple[Tensor, Tensor]
    """What it made of them."""


class RotaryTap:
    """Remembers the angles a modeling file last rotated with, until an attention layer collects them."""

    def __init__(self, apply: Callable[..., Any]) -> None:
        self.apply = apply
        self.armed = 0
        self.last: Rotated | None = None

    def collect(self) -> Rotated | None:
        """Return the rotation since the last call, and forget it; None if there was none."""
        last, self.last = self.last, None
        return last


class Slot:
    """Where one attention layer leaves its tensors while it is captured."""

    def __init__(
        self,
        model: str,
        layer: int,
        parts: tuple[Part, ...],
        rotary: RotaryTap | None,
        *,
        strip: bool = False,
        last: bool = False,
    ) -> None:
        self.model, self.layer, self.last = model, layer, last
        self.parts, self.rotary, self.strip = parts, rotary, strip
        self.then: Callable[[Slot], None] | None = None
        """Called as soon as the layer has left its tensors."""
        self.looks_at_mask = False
        """Whether to look for a bias in the values of attention masks."""
        self.plain: bool
        """Whether keys and queries are those from before the rotation."""
        self.clear()

    def clear(self) -> None:
        """Forget everything about the last forward pass."""
        self.drop()
        self.angles: Angles | None = None
        self.plain = False
        self.logit_rule: LogitRule | None = None
        self.seen = self.dim = 0

    def drop(self) -> None:
        """Forget the tensors, but not that the layer ran."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.queries: Tensor | None = None

    def write(self, query: Tensor, key: Tensor, value: Tensor, arguments: Mapping[str, Any]) -> None:
        """Take over the tensors of one call, each ``batch head time dim``.

        Args:
            query: of the call, as are ``key`` and ``value``.
            key: likewise.
            value: likewise.
            arguments: the others of the call, by name.

        Raises:
            UnsupportedModelError: keys and values differ in shape, or the keys attended to are not those that
                were rotated.
        """
        self.seen += 1
        if self.parts and key.shape != value.shape:
            raise UnsupportedModelError(
                f"{self.model}, attention layer {self.layer}: "
                f"keys are {_axis_extent(key)} and values {_axis_extent(value)}; "
                "multi-head latent attention (MLA) cannot be captured"
            )
        self.logit_rule = read_logit_rule(query.shape[-1], arguments, look_at_mask=self.looks_at_mask)
        query, key = self._rotation(query, key)
        self.dim = key.shape[-1]
        self.keys = _own_copy(key) if "keys" in self.parts else None
        self.values = _own_copy(value) if "values" in self.parts else None
        self.queries = _own_copy(query) if "queries" in self.parts else None

    def _rotation(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Note the angles, and return queries and keys to keep.

        If attention is given the very result of the rotation, these are the tensors from before it.
        """
        collected = self.rotary.collect() if self.rotary is not None else None
        if collected is None:
            return query, key
        self.angles, rows = collected.angles, collected.rows
        attended = key.numel() // key.shape[-1]
        if self.parts and rows != attended:
            raise UnsupportedModelError(
                f"{self.model}, attention layer {self.layer}: attends to {attended} keys but rotated {rows}; "
                "strip and match need a forward pass without past keys that rotates every head; "
                "use rotary: keep"
            )
        self.plain = self.strip and collected.after[0] is query and collected.after[1] is key
        return collected.before if self.plain else (query, key)


def module_namespace(module: nn.Module) -> dict[str, Any]:
    """Return the globals in which a module's ``forward`` looks names up: those of its modeling file."""
    names: dict[str, Any] = inspect.unwrap(type(module).forward).__globals__
    return names


def tap_attention(module: nn.Module, implementation: str) -> None:
    """Wrap the attention function this module calls, unless that is done already."""
    names = module_namespace(module)
    if implementation == "eager":
        if EAGER in names:
            names[EAGER] = tap_function(names[EAGER])
        return
    functions = names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    if implementation not in functions:
        return
    wrapped = tap_function(functions[implementation])
    if functions is ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(implementation, wrapped)
    else:
        functions[implementation] = wrapped


def tap_rotary(module: nn.Module) -> RotaryTap | None:
    """Wrap ``apply_rotary_pos_emb`` of a module's modeling file, once, and return its tap.

    None if the file has no such function with the arguments ``q, k, cos, sin``.
    """
    names = module_namespace(module)
    apply = names.get(ROTATE)
    if apply is None or list(inspect.signature(apply).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None
    if not hasattr(apply, "kava_tap"):
        names[ROTATE] = _tapped_rotation(apply)
    tap: RotaryTap = names[ROTATE].kava_tap
    return tap


def tap_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return an attention function that leaves its arguments in the calling module's slot, if it has one."""
    if hasattr(original, "kava_tap"):
        return original

    names = list(inspect.signature(original).parameters)[len(TENSORS) :]

    @functools.wraps(original)
    def attention(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        slot = module.__dict__.get(SLOT)
        if slot is not None:
            slot.write(query, key, value, dict(zip(names, args, strict=False)) | kwargs)
            if slot.then is not None and slot.parts:
                slot.then(slot)
            if slot.last and not torch.compiler.is_compiling():
                raise StopForward
        return original(module, query, key, value, *args, **kwargs)

    attention.kava_tap = True  # type: ignore[attr-defined]
    return attention


def _tapped_rotation(original: Callable[..., Any]) -> Callable[..., Any]:
    tap = RotaryTap(original)

    @functools.wraps(original)
    def rotate(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        after = original(q, k, cos, sin, *args, **kwargs)
        if tap.armed:
            angles = Angles(cos, sin, k.shape[-1])
            tap.last = Rotated(angles, k.numel() // k.shape[-1], (q, k), after)
        return after

    rotate.kava_tap = tap  # type: ignore[attr-defined]
    return rotate


def _own_copy(x: Tensor) -> Tensor:
    """Return the tensor, or a copy if it is a teacher's and would keep a wider projection alive."""
    if x.requires_grad or torch.compiler.is_compiling() or x.untyped_storage().nbytes() == x.nbytes:
        return x
    return x.clone()


def _axis_extent(x: Tensor) -> str:
    return f"{x.shape[1]} heads × {x.shape[3]}"
