"""Small copies of reports for docs/results: ``python docs/tools/make_experiment_results.py RUNS/NAME …``.

Of a report (``kava report``) the text, the comparisons, the runs and the curves of the scores are kept, and
the figures that carry the answer, with fewer colours; the page and the curves of other metrics are left out.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from kava_core.experiment.report.write_report import FIGURES, write_report

RESULTS = Path(__file__).parents[1] / "results"
PICTURES = ("differences", "curve-exact-match", "curve-ce", "cost")
TEXTS = ("report.md", "comparisons.csv", "comparisons.json", "runs.csv")
CURVES = ("exact_match", "ce")
COLOURS = 48


def shortened(text: str) -> str:
    """The report without the figures that are not kept."""
    lines = text.splitlines(keepends=True)
    figure = re.compile(rf"^!\[.*\]\({FIGURES}/(.+)\.png\)$")
    return "".join(
        line for line in lines if not (found := figure.match(line.rstrip())) or found[1] in PICTURES
    )


def kept_curves(text: str) -> str:
    """The rows of ``curves.csv`` about the scores, exactly as they are."""
    head, *rows = text.splitlines(keepends=True)
    return head + "".join(row for row in rows if row.split(",")[-2] in CURVES)


def keep(runs: Path) -> Path:
    """Report on one experiment and copy what is kept; the folder."""
    target = RESULTS / runs.name
    shutil.rmtree(target, ignore_errors=True)
    (target / FIGURES).mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder)
        list(write_report([runs], whole))
        for name in TEXTS:
            text = (whole / name).read_text(encoding="utf-8")
            (target / name).write_text(shortened(text) if name.endswith(".md") else text, encoding="utf-8")
        curves = (whole / "curves.csv").read_text(encoding="utf-8")
        (target / "curves.csv").write_text(kept_curves(curves), encoding="utf-8")
        for name in PICTURES:
            picture = whole / FIGURES / f"{name}.png"
            if picture.exists():
                small = Image.open(picture).convert("RGB").quantize(COLOURS)
                small.save(target / FIGURES / picture.name, optimize=True)
    return target


if __name__ == "__main__":
    for given in sys.argv[1:]:
        print(keep(Path(given)))
