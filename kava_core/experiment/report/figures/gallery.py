"""Make a section of pictures of one sort, of which a report shows only the first ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from kava_core.experiment.report.figures.line_charts import MOST_FIGURES, note_on_omitted
from kava_core.experiment.report.pages.page_elements import Block, Gallery, Paragraph, Picture, Section

Shown = TypeVar("Shown")


def gallery_section(
    key: str, title: str, shown: Sequence[Shown], draw: Callable[[Shown], Picture], *, how: str, absent: str
) -> Section:
    """Return a section: how to read its pictures, then the pictures.

    Args:
        key: of the section.
        title: of the section.
        shown: what is drawn, a picture each.
        draw: makes a picture.
        how: explains the pictures.
        absent: the text if there is nothing to draw.
    """
    if not shown:
        return Section(key, title, absent=absent)
    blocks: list[Block] = [Paragraph(how), Gallery([draw(one) for one in shown[:MOST_FIGURES]])]
    return Section(key, title, [*blocks, *note_on_omitted(len(shown))])
