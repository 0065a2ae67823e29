"""The table of architectures in docs/models.md, made by capturing each one.

Write it anew with ``python tests/core/model_table.py``.
"""

from pathlib import Path

import torch
from tiny_models import REFUSED, WORKS, Case

from kava_core.errors import UnsupportedModelError
from kava_core.kv.probe import probe_geometry

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Models

kava captures keys, values and queries of transformers decoders whose attention goes through transformers'
`AttentionInterface`. Others are refused by name, before anything is trained. The rows below are tested on
tiny models with random weights: captured values equal the projections' outputs, keys without rotation equal
the keys before rotation, logits do not change, and gradients reach the key projection. An architecture that
is not listed may work: `kava` asks the model itself, not this table.

This page is written by `python tests/core/model_table.py`.

| architecture | `model_type` | captured | remarks |
|---|---|---|---|
"""


def page() -> str:
    """The whole text of docs/models.md."""
    return HEAD + "".join(row(case) for case in WORKS + REFUSED)


def row(case: Case) -> str:
    """One architecture's line."""
    captured, remarks = outcome(case)
    return f"| {case.name} | `{case.model_type}` | {captured} | {remarks} |\n"


def outcome(case: Case) -> tuple[str, str]:
    """Whether the architecture can be captured, and what is special or why not."""
    try:
        probe_geometry(case.config())
    except UnsupportedModelError as error:
        return "refused", str(error).split(": ", 1)[1]
    return "yes", case.note


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page())
