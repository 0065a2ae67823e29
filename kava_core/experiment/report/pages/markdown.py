"""A report as Markdown: sentences and tables that paste into a paper."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from kava_core.experiment.report.pages.blocks import (
    Answers,
    Block,
    Cards,
    Chapter,
    Gallery,
    Paragraph,
    Table,
    Tiles,
)

SPECIAL = re.compile(r"[\\`*\[\]$|~#]|(?<!\w)_|_(?!\w)")


def markdown(chapters: Sequence[Chapter], figures: str) -> str:
    """Everything but the answers' layout; figures are linked in the folder ``figures``."""
    lines: list[str] = []
    for chapter in chapters:
        lines += [f"# {escaped(chapter.title)}", "", escaped(chapter.under), ""]
        for section in chapter.sections:
            lines += [f"## {escaped(section.title)}", ""]
            lines += [escaped(section.absent), ""] if section.absent else []
            for block in section.blocks:
                lines += [*_block(block, figures), ""]
    return "\n".join(lines).rstrip() + "\n"


def escaped(text: str) -> str:
    """One line in which no character is markup, for GitHub and pandoc."""
    line = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())
    return SPECIAL.sub(lambda found: f"\\{found[0]}", line)


def _block(block: Block, figures: str) -> Iterator[str]:
    match block:
        case Paragraph():
            title = f"**{escaped(block.title)}.** " if block.title else ""
            yield title + escaped(block.text)
        case Tiles():
            yield ", ".join(f"{escaped(name)}: {escaped(number)}" for number, name, _ in block.tiles)
        case Cards():
            for card in block.cards:
                yield f"- {' '.join(map(escaped, (card.sentence, *card.notes)))}"
        case Table():
            yield from _table(block)
        case Gallery():
            for picture in block.pictures:
                yield f"![{escaped(picture.alt)}]({figures}/{picture.name}.png)"
        case Answers():
            yield from _answers(block)


def _table(table: Table) -> Iterator[str]:
    yield f"{escaped(table.caption)}:"
    yield ""
    yield _row(table.head)
    yield _rule(table)
    yield from map(_row, table.rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"


def _rule(table: Table) -> str:
    rules = ("---" if place < table.left else "---:" for place in range(len(table.head)))
    return f"| {' | '.join(rules)} |"


def _answers(block: Answers) -> Iterator[str]:
    yield f"{escaped(block.title)}:"
    yield ""
    yield _row(["", "prompt", "expected", "wrote"])
    yield "| --- | --- | --- | --- |"
    for one in block.answers:
        yield _row(["right" if one.correct else "wrong", one.prompt, one.gold, one.wrote])
