"""Set how figures look: colours that the colour-blind tell apart, light and dark, legend below the axes."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kava_core.experiment.report.pages.display_text import figure_text, printable_text, short_labels
from kava_core.experiment.report.pages.page_elements import Picture

DPI = 150
WIDTH = 4.6
"""Inches of a figure that shares its row."""

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe & Ito, "Color Universal Design" (2008), without black and the yellow that white paper swallows."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Style:
    """Colours of a page."""

    paper: str
    ink: str
    faint: str
    palette: tuple[str, ...]


LIGHT = Style("#ffffff", "#1c2430", "#d9dee6", OKABE_ITO)
DARK = Style("#161b22", "#e6eaf0", "#39414d", ("#4C9BE8", "#F08A3E", "#2FC49A", *OKABE_ITO[3:5], "#9AD7F5"))


@dataclass(frozen=True)
class Look:
    """How one of several names is drawn."""

    label: str
    colour: str
    dash: Any
    marker: str


def looks_of_names(names: Iterable[str], style: Style) -> dict[str, Look]:
    """Return a look for every name: first colours, then dashes, so that no two are the same."""
    looks = {}
    for place, (name, label) in enumerate(short_labels(names).items()):
        count = len(style.palette)
        colour = style.palette[place % count]
        dash = DASHES[place // count % len(DASHES)]
        looks[name] = Look(label, colour, dash, MARKERS[place % len(MARKERS)])
    return looks


Draw = Callable[[Style], Figure]


def draw_picture(name: str, alt: str, draw: Draw, *, wide: bool = False) -> Picture:
    """Draw a figure for a light and a dark page.

    Args:
        name: of its files, without ending.
        alt: what it shows, for those who do not see it.
        draw: makes the figure in a style.
        wide: whether it takes the page's whole width.
    """
    with using_style(LIGHT):
        figure = draw(LIGHT)
        png = _rendered(figure, "png")
        figure.set_layout_engine("none")  # its layout is done; doing it again would take as long
        svg = _rendered(figure, "svg")
    with using_style(DARK):
        dark = _rendered(draw(DARK), "png")
    return Picture(name, printable_text(alt), png, dark, svg.decode("utf-8"), wide)


def _rendered(figure: Figure, format: str) -> bytes:
    stream = io.BytesIO()
    metadata = {"Date": None} if format == "svg" else {"Software": None}
    figure.savefig(stream, format=format, dpi=DPI, metadata=metadata)
    return stream.getvalue()


@contextmanager
def using_style(style: Style) -> Iterator[None]:
    """Set matplotlib to a style while a figure is made."""
    settings: Any = {
        "text.color": style.ink,
        "xtick.color": style.ink,
        "ytick.color": style.ink,
        "axes.labelcolor": style.ink,
        "axes.titlecolor": style.ink,
        "axes.edgecolor": style.faint,
        "axes.facecolor": style.paper,
        "figure.facecolor": style.paper,
        "savefig.facecolor": style.paper,
        "grid.color": style.faint,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9.5,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9,
        "font.family": ["DejaVu Sans"],
        "svg.fonttype": "none",
        "svg.hashsalt": "kava",
    }
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        # A name may hold characters that the font lacks; they are drawn as boxes.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        yield


def figure_with_axes(names: Iterable[str] = ()) -> tuple[Figure, Axes]:
    """Return an empty figure with room below for a legend of these names."""
    figure = Figure(figsize=(WIDTH, 3.2 + legend_height(names)), layout="constrained")
    return figure, figure.add_subplot()


def legend_height(names: Iterable[str]) -> float:
    """Return the height of a legend, in inches."""
    labels = list(short_labels(names).values())
    return 0.24 * math.ceil(len(labels) / _legend_columns(labels)) if labels else 0.0


def add_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Add a legend below the axes, outside."""
    columns = _legend_columns([str(handle.get_label()) for handle in handles])
    figure.legend(
        handles=list(handles), loc="outside lower left", ncols=columns, frameon=False, handlelength=2.6
    )


def _legend_columns(labels: Sequence[str]) -> int:
    """Return 2 if two labels fit into the width, else 1."""
    return 2 if len(labels) > 1 and max(map(len, labels)) <= 20 else 1


def legend_entry(look: Look, **changes: Any) -> Line2D:
    """Return a legend's entry: a thick line in the look of a name."""
    style = {"color": look.colour, "linestyle": look.dash, "linewidth": 2.4, "label": figure_text(look.label)}
    return Line2D([], [], **(style | changes))


def needs_log_axis(values: Sequence[float], times: float = 20.0) -> bool:
    """Return whether positive values differ so much that a logarithmic axis shows them better."""
    return bool(values) and min(values) > 0 and max(values) > times * min(values)
