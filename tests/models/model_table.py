"""The tables of architectures in docs/guide/models.md, made by capturing each one.

Write the first anew with ``python -m tests.models.model_table``, both with ``--sweep`` (some minutes).
"""

import sys

import torch
import transformers

from kava_core.errors import UnsupportedModelError
from kava_core.kv.capture.geometry import probe_geometry
from tests.models.model_sweep import sweep
from tests.support.repository import ROOT
from tests.support.tiny_models import REFUSED, WORKS, Case

PAGE = ROOT / "docs" / "guide" / "models.md"
HEAD = """# Models

kava captures keys, values and queries of transformers decoders whose attention goes through transformers'
`AttentionInterface`. Others are refused by name, before anything is trained. An architecture that is not
listed may work: `kava` asks the model itself, not this page, which is written by
`python -m tests.models.model_table --sweep`.

Students write answers with transformers' `generate`. It reads prompts padded on the left, which not every
architecture allows: RoBERTa and its like count padding as positions. Before training, a few tokens are
written and compared with a plain pass over the same text. Where the logits differ, a line says so and every
token is written by a whole pass: slower, and right. Behind latent tokens such a model is refused.

## Quantised teachers

`quantize: int8 | int4 | nf4` rounds the weights of a teacher's linear layers while it is loaded
(`pip install 'kava[quantize]'`). Its cache has the same shapes and dtype; embeddings and head stay as they
are.

| `quantize` | library | memory of a weight | limits |
|---|---|---|---|
| `int8` | torchao | 1 byte | not GPT-2's layers, nor fused experts |
| `int4` | torchao | 1 byte (the rounding of 4 bits, groups of 32) | as `int8`; inputs in multiples of 32 |
| `nf4` | bitsandbytes | ½ byte | on CPU: inputs in multiples of 64, outputs of 32 |

Measured on CPU, on a random Llama 64 wide. The cosine of its keys with those of its fp32 weights is 0.99997
(int8), 0.993 (int4), 0.994 (nf4). `tests/models/test_quantize.py` holds int8 above 0.999 and the others above
0.97. On CUDA the three have not been run yet.

## Tested

The rows below are tested on tiny models with random weights. Captured values equal the projections' outputs,
and keys without rotation equal the keys before rotation. Logits do not change, and gradients reach the key
projection.

| architecture | `model_type` | captured | remarks |
|---|---|---|---|
"""
SWEPT_TITLE = "## Every causal language model of transformers "
SWEPT = """
Each `model_type` in its default configuration, at most eight layers deep, is run once without weights. "yes":
all keys and values are seen, and attached to the graph. "k of n layers": choose layers with the layer
mapper; the others have no keys and values, or of another shape. "Not tried": the model could not be built or
run in this way, which says nothing about capturing it.

| `model_type` | captured | remarks |
|---|---|---|
"""


def page(swept: str) -> str:
    """The whole text of docs/guide/models.md; ``swept`` is its last section."""
    return HEAD + "".join(row(case) for case in WORKS + REFUSED) + "\n" + swept


def swept_section(text: str) -> str:
    """The last section as it stands on the page: it belongs to one version of transformers."""
    return "".join(text.partition(SWEPT_TITLE)[1:])


def new_section() -> str:
    """The last section of the installed transformers."""
    return f"{SWEPT_TITLE}{transformers.__version__}\n" + SWEPT + "".join(sweep())


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
    section = new_section() if "--sweep" in sys.argv else swept_section(PAGE.read_text())
    PAGE.write_text(page(section))
