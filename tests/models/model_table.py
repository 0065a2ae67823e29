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

## Where weights come from

| `path` | what is loaded |
|---|---|
| `Qwen/Qwen3-0.6B` | a model of the hub, at `revision` if that is given |
| `models/qwen` | a folder that transformers saved; weights must be safetensors |
| `models/qwen-q4.gguf` | a GGUF file (`pip install 'kava[gguf]'`), dequantised to the spec's `dtype` |
| `models/my-lora` | a PEFT adapter folder (`pip install 'kava[lora]'`), merged into its base model |

Config and tokenizer of a GGUF file are read once, and its weights are dequantised once. Both stay in the
cache (`$KAVA_CACHE/gguf`), under the file's sha256: a changed file is another model. The weights take there
what the model takes in `dtype`. transformers rebuilds the tokenizer from the file and may split texts a
little otherwise than the original one. Where you have the original, name it in `tokenizer`.

An adapter's base model is the one in its `adapter_config.json`. A relative folder there counts from the
working directory, or else from the adapter's folder. Students are merged too, and all their weights train;
add `lora` to train a new adapter on top.

## Models of some layers

A student may be a part of a pretrained model:

```yaml
student: {path: HuggingFaceTB/SmolLM2-135M-Instruct, keep_layers: even:10}
```

| `keep_layers` | which layers stay |
|---|---|
| `even:10` | ten at equal distances, the first and the last among them |
| `[0, 3, 7, 29]` | these, counted from 0 |
| `influence:10` | the ten that change the direction of hidden states most |

Vocabulary, head and final norm stay. Lists with an entry for each layer are cut alike, and layers are
numbered anew, so the saved student is a plain model with fewer layers. Teachers can be cut in the same way.

Influence is 1 minus the mean cosine of a layer's input and output
([ShortGPT](https://arxiv.org/abs/2403.03853)). It is measured on the first `train.calibration_examples`
training examples, once, and kept in the cache. `kava train` prints which layers stay, and `run.json` holds
them under `kept_layers`. `kava plan` and `kava check` need no weights for any of the three.

Before anything is loaded, kava compares each layer that stays with the layer it becomes. A model in which
the two differ is refused in one line: shared layers, a scale that depends on the layer's number, an encoder
with a decoder.

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
