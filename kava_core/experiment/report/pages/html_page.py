"""Render a report as one page that needs nothing else: no network, no script, figures inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kava_core.experiment.report.pages.page_elements import Chapter

TEMPLATES = Path(__file__).parent / "templates"


def render_page(chapters: Sequence[Chapter], *, title: str) -> str:
    """Return the whole page, in which every text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["data"] = _data_url
    return environment.get_template("report.html.jinja").render(chapters=chapters, title=title)


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
