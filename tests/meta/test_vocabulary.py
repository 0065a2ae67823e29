"""One set of words for axes, in annotations and einops patterns alike."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kava_core.protocols.axes import VOCABULARY
from tests.support.source import python_files, tree

PLACES = (
    *("kava_core/build", "kava_core/data", "kava_core/distill", "kava_core/jobs", "kava_core/kv"),
    *("kava_core/latent", "kava_core/models", "kava_core/protocols", "kava_core/train"),
    "kava_plugins",
)
DTYPES = {"Float", "Int", "Bool", "Shaped", "Num", "Integer", "Inexact", "Complex", "Key"}
EINOPS = {"rearrange", "reduce", "repeat", "einsum", "pack", "unpack"}


def foreign(axes: str) -> list[str]:
    """Words of an axis string that are no axis. Not words: numbers, ``_``, ``...``, ``{…}``, ``->``.

    >>> foreign("#batch *_ t_time {student.layer} layer={x} 3 dim-1 (head dim) -> heads")
    ['heads']
    """
    words = re.sub(r"\{[^}]*\}|->|\.\.\.|…|[()+,*/#?]|-", " ", axes).split()
    return [
        word
        for word in (w.rstrip("=") for w in words)
        if not re.fullmatch(r"_|\d+", word) and word not in VOCABULARY
    ]


def annotations(file: Path) -> Iterator[tuple[str, int]]:
    """Axis strings of jaxtyping annotations."""
    for node in ast.walk(tree(file)):
        if (
            isinstance(node, ast.Subscript)
            and _last_name(node.value) in DTYPES
            and isinstance(node.slice, ast.Tuple)
        ):
            axes = node.slice.elts[-1]
            assert isinstance(axes, ast.Constant), f"{file}:{node.lineno}: axes must be written out"
            yield axes.value, node.lineno


def patterns(file: Path) -> Iterator[tuple[str, int]]:
    """Patterns of einops calls. ``torch.einsum`` speaks in single letters and is none of them."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in EINOPS:
            strings = (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
            yield from ((string, node.lineno) for string in strings if " " in string or "->" in string)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


@pytest.mark.parametrize("file", [*map(str, python_files(*PLACES))])
def test_axis_words_are_the_vocabulary(file: str) -> None:
    found = [*annotations(Path(file)), *patterns(Path(file))]
    wrong = {f"{file}:{line}: {axes!r}": foreign(axes) for axes, line in found if foreign(axes)}
    assert wrong == {}


def test_annotations_and_patterns_are_found() -> None:
    """The test above sees the strings it is about."""
    assert "layer t_layer" in dict(annotations(Path("kava_core/protocols/layer_mapper.py")))
    assert "batch layer head time dim -> (batch layer head time) dim" in dict(
        patterns(Path("kava_core/protocols/time_map.py"))
    )


@pytest.mark.parametrize(
    ("axes", "wrong"),
    [
        ("batch layer head time dim", []),
        ("#batch *_ ... 3 _ {student.layer} layer={teacher.layer}", []),
        ("batch -> heads", ["heads"]),
        ("b (head dim) t", ["b", "t"]),
        ("layers={x.y}", ["layers"]),
    ],
)
def test_foreign_words(axes: str, wrong: list[str]) -> None:
    assert foreign(axes) == wrong
