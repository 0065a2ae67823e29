"""Time maps against what one would write first: building by characters, applying, resampling.

Both arms run in one process, alternated, on one thread; CPU time, medians over rounds of the ratio.

    python benchmarks/time_map.py [--rounds 7] [--data /work/shared/data] [--longest 8192]
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from alternated import alternate, clock, ratio
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kava_core.data import tokenizer_training
from kava_core.data.collate import Collator
from kava_core.data.jsonl import read_examples
from kava_core.protocols.axes import Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_core.specfile.sections.data import Template
from kava_core.specfile.sections.models import TrainTokenizer
from kava_plugins.time_warpers import CharIoUConfig, SegmentConfig

GEOMETRY = Geometry(layer=1, head=1, dim=1, qhead=1, hidden=1)
IOU = CharIoUConfig().build(teacher=GEOMETRY, student=GEOMETRY)
SEGMENT = SegmentConfig(mode="interpolate").build(teacher=GEOMETRY, student=GEOMETRY)
Arm = Callable[[], object]


def row(what: str, naive: Arm, ours: Arm, rounds: int) -> str:
    """One line of the table: medians in milliseconds, and the median ratio naive / ours."""
    seconds = alternate({"naive": naive, "ours": ours}, rounds)
    medians = [1e3 * statistics.median(each) for each in seconds.values()]
    times = ratio(seconds["naive"], seconds["ours"])
    return f"| {what} | {medians[0]:.2f} | {medians[1]:.2f} | ×{times:.3g} |"


def one_row(spans: Tensor, segments: Tensor | None = None) -> Timeline:
    """A timeline of full rows."""
    mask = torch.ones(spans.shape[:2], dtype=torch.bool)
    positions = torch.arange(spans.shape[1]).expand(mask.shape)
    return Timeline(mask, positions, torch.zeros_like(positions) if segments is None else segments, spans)


def random_tokens(length: int, seed: int) -> Timeline:
    """Adjacent tokens of 1 to 7 characters."""
    widths = torch.randint(1, 8, (1, length), generator=torch.Generator().manual_seed(seed))
    ends = widths.cumsum(1)
    return one_row(torch.stack([ends - widths, ends], -1))


def double_loop(teacher: Timeline, student: Timeline) -> list[tuple[int, int, float]]:
    """Entries of the IoU matrix, pair by pair."""
    theirs, found = teacher.spans[0].tolist(), []
    for i, (a, b) in enumerate(student.spans[0].tolist()):
        for j, (c, d) in enumerate(theirs):
            if (shared := min(b, d) - max(a, c)) > 0:
                found.append((i, j, shared / (max(b, d) - min(a, c))))
    return found


def table(teacher: Timeline, student: Timeline) -> Tensor:
    """The IoU matrix as array operations on all pairs."""
    a, b = (side[:, :, None] for side in student.spans.unbind(-1))
    c, d = (side[:, None, :] for side in teacher.spans.unbind(-1))
    shared = (torch.minimum(b, d) - torch.maximum(a, c)).clamp_min(0)
    dense = shared / (torch.maximum(b, d) - torch.minimum(a, c))
    return dense / dense.sum(-1, keepdim=True).clamp_min(1e-9)


def building(rounds: int) -> Iterator[str]:
    """Building a char_iou map."""
    for length, naive, name in (
        (512, double_loop, "double loop"),
        (512, table, "all pairs"),
        (4096, table, "all pairs"),
    ):
        sides = random_tokens(length, 0), random_tokens(length, 1)
        yield row(
            f"char-IoU build, {length} tokens, {name}",
            partial(naive, *sides),
            partial(IOU, *sides),
            rounds,
        )


def backward(forward: Callable[[Tensor], Tensor], x: Tensor) -> Arm:
    """Forward and backward with respect to ``x``."""
    leaf = x.detach().requires_grad_()

    def run() -> None:
        leaf.grad = None
        forward(leaf).sum().backward()

    return run


def both_ways(
    what: str, naive: Callable[[Tensor], Tensor], ours: Callable[[Tensor], Tensor], x: Tensor, rounds: int
) -> Iterator[str]:
    """A row for the forward pass and one with the backward pass."""
    yield row(f"{what}, forward", lambda: naive(x), lambda: ours(x), rounds)
    yield row(f"{what}, forward + backward", backward(naive, x), backward(ours, x), rounds)


def applying(rounds: int, longest: int) -> Iterator[str]:
    """Applying a char_iou map."""
    for length in (512, 2048, 8192):
        if length > longest:
            continue
        time_map: TimeMap = IOU(random_tokens(length, 0), random_tokens(length, 1))
        x, dense = torch.randn(1, 2, 2, length, 64), time_map.dense(length)[:, None, None]
        yield from both_ways(
            f"apply, {length} → {length}, dense matrix",
            partial(torch.matmul, dense),
            time_map.apply,
            x,
            rounds if length < 8192 else 3,
        )


def segmented(sizes: tuple[int, int, int], batch: int) -> Timeline:
    """Rows of these segments, each example a little different."""
    rows = []
    for b in range(batch):
        prompt, reasoning, answer = sizes[0] + b, sizes[1] - 2 * b, sizes[2] + b
        rows.append(torch.tensor([0] * prompt + [1] * reasoning + [2] * answer))
    segments = torch.stack(rows)
    return one_row(torch.zeros(*segments.shape, 2, dtype=torch.long), segments)


def loops(x: Tensor, teacher: Timeline, student: Timeline) -> Tensor:
    """``F.interpolate`` for every example, layer and segment."""
    batch, layer, head, _, dim = x.shape
    found = x.new_zeros(batch, layer, head, student.mask.shape[1], dim)
    for b in range(batch):
        for segment in range(3):
            read, written = teacher.segments[b] == segment, int((student.segments[b] == segment).sum())
            begin = int((student.segments[b] == segment).nonzero()[0])
            for at in range(layer):
                block = x[b, at, :, read].mT
                resampled = F.interpolate(block, size=written, mode="linear").mT
                found[b, at, :, begin : begin + written] = resampled
    return found


def resampling(rounds: int) -> Iterator[str]:
    """The segment warp: plan and application together."""
    teacher, student = segmented((60, 100, 20), 8), segmented((50, 70, 20), 8)
    x = torch.randn(8, 12, 2, 180, 64)
    yield from both_ways(
        "segment warp, 8 × 12 layers, loops of F.interpolate",
        lambda x: loops(x, teacher, student),
        lambda x: SEGMENT(teacher, student).apply(x),
        x,
        rounds,
    )


def share_of_tokenizing(rounds: int, data: Path, size: int) -> str:
    """Building the maps of GSM8K in batches, beside tokenizing both sides as the collator does."""
    examples = read_examples(data / "gsm8k" / "train.jsonl", "gsm8k", 384)
    trained = tokenizer_training.train_on_texts(
        TrainTokenizer(kind="bpe", vocab_size=8000), [one.prompt for one in examples]
    )
    own = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=tokenizer_training.EOS)
    mistral = AutoTokenizer.from_pretrained(data / "tokenizers" / "mistral")
    collator = Collator(own, {"mistral": mistral}, Template())
    items = collator.encode(examples)
    batches = [collator(items[first : first + size]) for first in range(0, len(items), size)]
    pairs = [
        (Timeline.from_batch(b["teachers"]["mistral"]), Timeline.from_batch(b["student"])) for b in batches
    ]
    build: Arm = lambda: [IOU(*pair) for pair in pairs]  # noqa: E731
    tokenize: Arm = lambda: collator.encode(examples)  # noqa: E731
    build(), tokenize()
    shares = [100 * clock(build) / clock(tokenize) for _ in range(rounds)]
    return (
        f"char-IoU maps of {len(examples)} GSM8K examples, Mistral to byte-level BPE, batches of {size}: "
        f"{statistics.median(shares):.1f} % of tokenizing both"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--data", type=Path, default=Path("/work/shared/data"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| what | naive, ms | kava, ms | ratio |\n|---|---|---|---|")
    for line in building(options.rounds):
        print(line, flush=True)
    for line in (*applying(options.rounds, options.longest), *resampling(options.rounds)):
        print(line, flush=True)
    if (options.data / "tokenizers" / "mistral").is_dir():
        for size in (16, 64):
            print(share_of_tokenizing(options.rounds, options.data, size))


if __name__ == "__main__":
    main()
