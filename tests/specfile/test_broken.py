"""Broken specs: the whole text of stderr and the exit code, for every file in broken_specs/.

``{kv_loss}`` in an expected text stands for the installed names of that kind.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kava_core.cli.app import main
from kava_core.hookspecs import KINDS
from kava_core.registry import Registry

FOLDER = Path(__file__).parent / "broken_specs"
BROKEN = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def expected(name: str) -> str:
    """The golden text with the installed names filled in."""
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    registry = Registry.build()
    for kind in KINDS:
        text = text.replace(f"{{{kind}}}", ", ".join(registry.names(kind)))
    return text


def run_check(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit code and stderr of ``kava check``."""
    with pytest.raises(SystemExit) as stopped:
        main(["check", *arguments])
    return stopped.value.code, capsys.readouterr().err


def test_there_are_ten_and_each_has_its_text() -> None:
    assert len(BROKEN) >= 10
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(BROKEN)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_spec(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(FOLDER)
    assert run_check([f"{name}.yaml"], capsys) == (2, expected(name))


def test_deep_nesting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 3000)
    assert run_check(["deep.yaml"], capsys) == (2, "deep.yaml:1:53: nested more than 50 deep\n")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "spec.yaml: the file is empty"),
        (b" \n\n", "spec.yaml: the file is empty"),
        (b"# only a comment\n", "spec.yaml:1:1: there is nothing but comments"),
        (b"- a\n", "spec.yaml:1:1: a spec must be a mapping, not a list"),
        (b"a: 1\nb: \xff\n", "spec.yaml:2: not UTF-8 (byte 0xff)"),
        (b"a: 1\nb: x\x07\n", "spec.yaml:2:5: character U+0007 is not allowed"),
        (b"a: 1\n" * 300_000, "spec.yaml: a spec has at most 1048576 bytes; this file is larger"),
    ],
)
def test_not_a_spec_at_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_bytes(content)
    assert run_check(["spec.yaml"], capsys) == (2, text + "\n")


def test_missing_file_and_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert run_check(["nope.yaml"], capsys) == (2, "nope.yaml: no such file\n")
    assert run_check(["folder"], capsys) == (2, "folder: cannot be read: Is a directory\n")
