"""Define what a report is made of, before it is a page or a Markdown text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

Tone = Literal["good", "bad", "open", "warning", "plain"]
"""``good`` and ``bad``: a verdict; ``open``: none; ``warning``: look here; ``plain``: the rest."""


@dataclass(frozen=True)
class Paragraph:
    """A sentence or several."""

    kind: ClassVar[str] = "paragraph"
    text: str
    tone: Tone = "plain"
    title: str = ""


@dataclass(frozen=True)
class Tiles:
    """Large numbers side by side: a number, what it counts, how it is meant."""

    kind: ClassVar[str] = "tiles"
    tiles: Sequence[tuple[str, str, Tone]]


@dataclass(frozen=True)
class Card:
    """One comparison at a glance."""

    title: str
    word: str
    tone: Tone
    large: str
    """The difference."""
    small: str
    """Its interval."""
    sentence: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Cards:
    """All comparisons."""

    kind: ClassVar[str] = "cards"
    cards: Sequence[Card]


@dataclass(frozen=True)
class PageTable:
    """Cells as texts; numbers are aligned to the right, on one line."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    """So many first columns hold names."""
    texts: Sequence[int] = ()
    """Columns that hold longer texts."""


@dataclass(frozen=True)
class Picture:
    """A drawn figure."""

    name: str
    """Of its files, without ending."""
    alt: str
    """What it shows, for those who do not see it."""
    png: bytes
    dark: bytes
    """The same for a dark page."""
    svg: str
    wide: bool = False
    """Whether it takes the page's whole width."""


@dataclass(frozen=True)
class Gallery:
    """Figures side by side."""

    kind: ClassVar[str] = "gallery"
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Answer:
    """What a student wrote."""

    prompt: str
    gold: str
    wrote: str
    correct: bool


@dataclass(frozen=True)
class AnswerList:
    """Some answers of one run."""

    kind: ClassVar[str] = "answers"
    title: str
    answers: Sequence[Answer]


Block = Paragraph | Tiles | Cards | PageTable | Gallery | AnswerList


@dataclass(frozen=True)
class Section:
    """A chapter of a report; ``absent`` says in a line why it has no blocks."""

    key: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    absent: str = ""


@dataclass(frozen=True)
class Chapter:
    """One experiment."""

    key: str
    title: str
    under: str
    """A line under the title."""
    sections: Sequence[Section]

    @property
    def pictures(self) -> list[Picture]:
        """Return all figures."""
        pictures: list[Picture] = []
        for section in self.sections:
            for block in section.blocks:
                if isinstance(block, Gallery):
                    pictures += block.pictures
        return pictures
