"""Strict YAML: what values come out, where they stand, and what is refused."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kava_core.errors import SpecError
from kava_core.specfile.reading.scalars import parse_plain_scalar
from kava_core.specfile.reading.source_map import SourceLocation
from kava_core.specfile.reading.yaml_loader import parse_yaml

START = SourceLocation("s.yaml", 1, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 0.0001),
        ("1E3", 1000.0),
        ("+.5", 0.5),
        ("1.", 1.0),
        ("-0", 0),
        ("08", 8),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("true", True),
        ("FALSE", False),
        ("yes", "yes"),
        ("on", "on"),
        ("No", "No"),
        ("~", None),
        ("", None),
        ("null", None),
        ("2026-11-20", "2026-11-20"),
        (".", "."),
        ("1e", "1e"),
        ("-", "-"),
        ("-.inf", -math.inf),
        ("+.INF", math.inf),
    ],
)
def test_plain_scalars_of_yaml_1_2(text: str, value: object) -> None:
    result = parse_plain_scalar(text)
    assert result == value
    assert type(result) is type(value)


def test_nan_and_long_numbers() -> None:
    assert math.isnan(parse_plain_scalar(".nan"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 40 characters, not 5000"):
        parse_plain_scalar("9" * 5000)


def test_quoted_scalars_and_keys_are_text() -> None:
    data, _ = parse_yaml("1: '2'\ntrue: \"null\"\nno: |\n  3\n", START)
    assert data == {"1": "2", "true": "null", "no": "3\n"}


def test_places() -> None:
    _, locations = parse_yaml("a:\n  - x\n  - b: {c: 1,\n         dé: 2}\n", START)
    assert str(locations.key_location(("a",))) == "s.yaml:1:1"
    assert str(locations.value_location(("a",))) == "s.yaml:2:3"
    assert str(locations.value_location(("a", 0))) == "s.yaml:2:5"
    assert str(locations.key_location(("a", 1, "b"))) == "s.yaml:3:5"
    assert str(locations.value_location(("a", 1, "b", "c"))) == "s.yaml:3:12"
    assert str(locations.value_location(("a", 1, "b", "dé"))) == "s.yaml:4:14"
    assert str(locations.value_location(("a", 1, "b", "not there", "at all"))) == "s.yaml:3:5"
    assert str(locations.key_location(("nowhere",))) == "s.yaml:1:1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1", "s.yaml:1:4: anchors (&x) are not allowed; write the value out"),
        ("a: [1, *x]", "s.yaml:1:8: aliases (*x) are not allowed; write the value out"),
        ("&k a: 1", "s.yaml:1:1: anchors (&k) are not allowed; write the value out"),
        ("a: !!int 1", "s.yaml:1:4: tags (!!int) are not allowed"),
        ("a: !mine {}", "s.yaml:1:4: tags (!mine) are not allowed"),
        ("a: ! x", "s.yaml:1:4: tags (!) are not allowed"),
        ("'a': 1\nb: 1\na: 2", "s.yaml:3:1: key 'a' is given twice, first in line 1"),
        ("{a: 1, a: 2}", "s.yaml:1:8: key 'a' is given twice, first in line 1"),
        ("? [x]\n: 1", "s.yaml:1:3: a key must be text, not a list or mapping"),
        ("<<: {a: 1}", "s.yaml:1:1: merge keys (<<) are not allowed"),
        ("%YAML 1.1\n---\na: 1", "s.yaml:1:1: directives (%) are not allowed"),
        ("a: 1\n---\nb: 1", "s.yaml:2:1: a second document is not allowed"),
        ('a: "\\ud800"', "s.yaml:1:4: half a surrogate pair is not a character"),
        ("a: 1\nb: 2\n c: 3", "s.yaml:3:3: not valid YAML: mapping values are not allowed here"),
        ("a: [1", "s.yaml:1:6: not valid YAML: expected ',' or ']', but got the end"),
        ("a: @x", "s.yaml:1:4: not valid YAML: found character '@' that cannot start any token"),
        ("a: " + "{a: " * 60, "s.yaml:1:200: nested more than 50 deep"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, START)
    assert str(caught.value) == message


def test_fifty_levels_are_allowed() -> None:
    value, _ = parse_yaml("[" * 50 + "]" * 50, START)
    for _ in range(49):
        (value,) = value
    assert value == []


@pytest.mark.parametrize("text", ["1e999", "\ufeff"])
def test_odd_but_allowed(text: str) -> None:
    parse_yaml(f"a: '{text}'", START)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc.", min_size=1), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(VALUES, st.booleans())
def test_reads_back_what_a_dumper_wrote(value: object, flow: bool) -> None:
    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    text = yaml.dump({"value": value}, Dumper=Plain, allow_unicode=True, default_flow_style=flow)
    assert parse_yaml(text, START)[0] == {"value": value}


def test_a_nul_is_refused_where_it_is_written() -> None:
    """No path may hold one, and in YAML it can only be written as an escape."""
    with pytest.raises(SpecError) as told:
        parse_yaml('a: 1\nb: "x\\0y"\n', START)
    assert str(told.value) == "s.yaml:2:4: a NUL character is not allowed"


@pytest.mark.parametrize("text", ["010", "-017", "+0010"])
def test_a_number_that_is_octal_to_some_is_refused(text: str) -> None:
    """YAML 1.1 reads 010 as 8, YAML 1.2 as 10: whoever wrote it meant one of the two."""
    with pytest.raises(SpecError) as told:
        parse_yaml(f"seeds: [{text}]", START)
    assert str(told.value) == (
        f"s.yaml:1:9: {text} is octal to some readers of YAML and decimal to others; leave out the leading "
        "zero, or quote text"
    )


def test_numbers_with_zeros_elsewhere_are_read() -> None:
    assert parse_yaml("[0, 007, 08, 10, 0.5, 0o17, '010']", START)[0] == [0, 7, 8, 10, 0.5, 15, "010"]
