"""Render a report as Markdown: sentences and tables that paste into a paper."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from kava_core.experiment.report.pages.page_elements import (
    AnswerList,
    Block,
    Cards,
    Chapter,
    Gallery,
    PageTable,
    Paragraph,
    Tiles,
)

SPECIAL = re.compile(r"[\\`*\[\]$|~#]|(?<!\w)_|_(?!\w)")


def render_markdown(chapters: Sequence[Chapter], figures: str) -> str:
    """Return a report as Markdown; figures are linked in the folder ``figures``."""
    lines: list[str] = []
    for chapter in chapters:
        lines += [f"# {escape_markdown(chapter.title)}", "", escape_markdown(chapter.under), ""]
        for section in chapter.sections:
            lines += [f"## {escape_markdown(section.title)}", ""]
            lines += [escape_markdown(section.absent), ""] if section.absent else []
            for block in section.blocks:
                lines += [*_block_lines(block, figures), ""]
    return "\n".join(lines).rstrip() + "\n"


def escape_markdown(text: str) -> str:
    """Return a text as one line in which no character is markup, for GitHub and pandoc."""
    line = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())
    return SPECIAL.sub(lambda match: f"\\{match[0]}", line)


def _block_lines(block: Block, figures: str) -> Iterator[str]:
    match block:
        case Paragraph():
            title = f"**{escape_markdown(block.title)}.** " if block.title else ""
            yield title + escape_markdown(block.text)
        case Tiles():
            yield ", ".join(
                f"{escape_markdown(name)}: {escape_markdown(number)}" for number, name, _ in block.tiles
            )
        case Cards():
            for card in block.cards:
                yield f"- {' '.join(map(escape_markdown, (card.sentence, *card.notes)))}"
        case PageTable():
            yield from _table_lines(block)
        case Gallery():
            for picture in block.pictures:
                yield f"![{escape_markdown(picture.alt)}]({figures}/{picture.name}.png)"
        case AnswerList():
            yield from _answer_lines(block)


def _table_lines(table: PageTable) -> Iterator[str]:
    yield f"{escape_markdown(table.caption)}:"
    yield ""
    yield _table_row(table.head)
    yield _table_ruler(table)
    yield from map(_table_row, table.rows)


def _table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escape_markdown, cells))} |"


def _table_ruler(table: PageTable) -> str:
    rules = ("---" if place < table.left else "---:" for place in range(len(table.head)))
    return f"| {' | '.join(rules)} |"


def _answer_lines(block: AnswerList) -> Iterator[str]:
    yield f"{escape_markdown(block.title)}:"
    yield ""
    yield _table_row(["", "prompt", "expected", "wrote"])
    yield "| --- | --- | --- | --- |"
    for answer in block.answers:
        verdict = "right" if answer.correct else "wrong"
        yield _table_row([verdict, answer.prompt, answer.gold, answer.wrote])
