"""How attention sinks differ from other tokens in real models: by values, keys and hidden states.

    python benchmarks/sinks.py FOLDER… [--texts 24] [--data ../shared/data/gsm8k/test.jsonl] [--layers 0 1 2]

Prints the numbers of docs/kinds/time_warpers.md. All are shares of the median over the tokens of a text: of
values and keys the geometric mean over the captured layers, of hidden states the largest over all layers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kava_core.kv.capture.capture import Capture
from kava_core.kv.maths.sinks import DRAINED, value_lengths

DATA = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "test.jsonl"


def texts(file: Path, count: int) -> Iterator[str]:
    """Yield question and answer of the first examples."""
    for line in file.read_text(encoding="utf-8").splitlines()[:count]:
        example = json.loads(line)
        yield f"{example['question']}\n{example['answer']}"


def shares_of_median(lengths: Tensor) -> Tensor:
    """Return every token's length as a share of the median; ``lengths`` are logarithms."""
    return (lengths - lengths.median()).exp()


@torch.no_grad()
def measure(model: Any, tokenizer: Any, text: str, layers: list[int] | None) -> dict[str, Tensor]:
    """Return the shares of every token of a text, by what is looked at."""
    capture, ids = Capture(model, layers=layers), tokenizer(text, return_tensors="pt").input_ids
    with capture:
        outputs = model(ids, use_cache=False, output_hidden_states=True)
    cache = capture.take()
    hidden = torch.stack(outputs.hidden_states[1:-1])[:, 0].norm(dim=-1)
    return {
        "values": shares_of_median(value_lengths(cache.values)[0].mean(0)),
        "keys": shares_of_median(value_lengths(cache.keys)[0].mean(0)),
        "hidden states": (hidden / hidden.median(1, keepdim=True).values).amax(0),
    }


def main() -> None:
    """Measure every model and print a row for each thing looked at."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--layers", type=int, nargs="+", help="capture these alone")
    options = parser.parse_args()
    print("| model | of | first tokens | later sinks | other tokens |")
    print("|---|---|---|---|---|")
    for folder in options.folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        measured = [
            measure(model, tokenizer, text, options.layers) for text in texts(options.data, options.texts)
        ]
        is_sink = torch.cat([shares["values"][1:] < DRAINED for shares in measured])
        for name in ("values", "keys", "hidden states"):
            first = torch.stack([shares[name][0] for shares in measured])
            later = torch.cat([shares[name][1:] for shares in measured])
            rows = (first, later[is_sink], later[~is_sink])
            print(f"| {folder.name} | {name} | {' | '.join(map(range_text, rows))} |", flush=True)


def range_text(shares: Tensor) -> str:
    """Return smallest and largest share, and how many there are."""
    return f"{shares.min():.2f} to {shares.max():.2f} ({len(shares)})" if len(shares) else "none"


if __name__ == "__main__":
    main()
