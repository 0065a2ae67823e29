"""Write a report for ``kava report``: load, judge, draw, write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from kava_core.errors import KavaError, SpecError
from kava_core.files import make_folder
from kava_core.runs.folder import refuse_inside_run

if TYPE_CHECKING:
    from kava_core.experiment.report.pages.page_elements import Chapter

NEEDED_PACKAGES = {"matplotlib": "plots", "jinja2": "plots", "scipy": "stats"}
"""What a report needs beyond kava, and the extra that brings it."""

FIGURES = "figures"


def write_report(folders: Sequence[Path], output: Path | None = None) -> Iterator[str]:
    """Write a report of one or several experiments; yields a line for each file that a person would open.

    Args:
        folders: what ``kava experiment`` or ``kava train`` wrote, ``runs/NAME`` each.
        output: where the report goes; ``FOLDER/report`` where there is one folder.

    Raises:
        SpecError: a folder holds no runs, several are given without ``output``, or that is inside a run.
        CheckpointError: a run's file is damaged.
        KavaError: something is not installed, or nothing can be written.
    """
    _check_installed()
    from kava_core.experiment.report.chapters import make_chapters
    from kava_core.experiment.report.experiment_data import load_experiments
    from kava_core.experiment.report.pages.csv_files import csv_texts
    from kava_core.experiment.report.pages.json_file import json_text

    target = _output_folder(folders, output)
    refuse_inside_run(target)
    experiments = load_experiments(folders)
    chapters = make_chapters(experiments)
    title = ", ".join(data.experiment.name for data in experiments)
    make_folder(target / FIGURES)
    _write_figures(chapters, target / FIGURES)
    for name, text in csv_texts(experiments).items():
        _write_file(target / name, text)
    _write_file(target / "comparisons.json", json_text(experiments))
    yield from _write_texts(chapters, title, target)


def _check_installed() -> None:
    missing = {name: extra for name, extra in NEEDED_PACKAGES.items() if find_spec(name) is None}
    if missing:
        extras = ",".join(sorted(set(missing.values())))
        raise KavaError(f"kava report needs {', '.join(missing)}: pip install 'kava[{extras}]'")


def _output_folder(folders: Sequence[Path], output: Path | None) -> Path:
    if output is not None:
        return output
    if len(folders) > 1:
        raise SpecError("--output: needed with several folders; it says where their common report goes")
    return folders[0] / "report"


def _write_figures(chapters: Sequence[Chapter], folder: Path) -> None:
    for chapter in chapters:
        for picture in chapter.pictures:
            _write_file(folder / f"{picture.name}.png", picture.png)
            _write_file(folder / f"{picture.name}.svg", picture.svg)


def _write_texts(chapters: Sequence[Chapter], title: str, target: Path) -> Iterator[str]:
    from kava_core.experiment.report.pages.display_text import printable_text
    from kava_core.experiment.report.pages.html_page import render_page
    from kava_core.experiment.report.pages.markdown_page import render_markdown

    _write_file(target / "report.md", render_markdown(chapters, FIGURES))
    _write_file(target / "report.html", render_page(chapters, title=printable_text(f"{title}: kava report")))
    yield f"report: {printable_text(target / 'report.html')}"
    tables = "runs.csv, curves.csv, comparisons.csv, comparisons.json"
    yield f"tables: {printable_text(target / 'report.md')}, {tables}, {FIGURES}/"


def _write_file(path: Path, content: str | bytes) -> None:
    raw = content.encode("utf-8") if isinstance(content, str) else content
    try:
        path.write_bytes(raw)
    except OSError as error:
        raise KavaError(f"{path}: cannot be written: {error.strerror}") from error
