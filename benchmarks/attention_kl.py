"""The divergence of attention rows against softmax maps with kl_div, and against one SDPA call.

    python benchmarks/attention_kl.py [--rounds 7] [--heads 8] [--width 64] [--time 512 2048 8192]

Every arm is a forward and a backward pass to the student's queries and keys (SDPA: values too). Ratios are
medians over rounds of the round's own ratio, all arms in one process, of CPU time with one thread; on a GPU
of wall time. Memory on a CPU is the growth of a fresh process's largest resident size over that after its
inputs were made (``VmHWM``), on a GPU the allocator's own peak. Maps are left out where they would not fit
(``--maps-until``).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from alternated import alternate, quartiles
from memory import MIB, largest_resident
from torch import Tensor

from kava_plugins.kv_losses._attention_divergence import attention_divergence

ARMS = ("blocks", "maps", "sdpa")


def draw(options: argparse.Namespace, time: int) -> list[Tensor]:
    """Queries and keys of a student and of a target near it, and values."""
    generator = torch.Generator(options.device).manual_seed(0)
    shape = (1, 1, options.heads, time, options.width)
    kv_shape = (1, 1, options.kv_heads, time, options.width)
    how = {"generator": generator, "device": options.device}
    tensors = [torch.randn(one, **how) for one in (shape, kv_shape, shape, kv_shape, kv_shape)]
    for one in (0, 1, 4):
        tensors[one].requires_grad_()
    return tensors


def blocks(tensors: list[Tensor]) -> None:
    """Ours."""
    weight = torch.full(tensors[0].shape[:2] + tensors[0].shape[3:4], 1e-3, device=tensors[0].device)
    attention_divergence(*tensors[:4], weight).backward()


def maps(tensors: list[Tensor]) -> None:
    """Both softmax maps, then kl_div of their logarithms, as it is usually written."""
    time = tensors[0].shape[3]
    later = torch.ones(time, time, dtype=torch.bool, device=tensors[0].device).triu(1)
    both = []
    for queries, keys in (tensors[:2], tensors[2:4]):
        keys = keys.repeat_interleave(queries.shape[2] // keys.shape[2], 2)
        scores = queries @ keys.mT / queries.shape[-1] ** 0.5
        both.append(scores.masked_fill(later, -1e9).softmax(-1))
    each = F.kl_div((both[0] + 1e-9).log(), both[1], reduction="none").sum(-1)
    (1e-3 * each.mean(2).sum()).backward()


def sdpa(tensors: list[Tensor]) -> None:
    """Attention itself, of the student."""
    queries, keys, _, _, values = (one[0] for one in tensors)
    output = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    output.backward(torch.ones_like(output))


WORK: dict[str, Callable[[list[Tensor]], None]] = {"blocks": blocks, "maps": maps, "sdpa": sdpa}


def own_peak(options: argparse.Namespace) -> float:
    """MiB that one pass of the arm takes beside its inputs, in this process."""
    tensors = draw(options, options.time[0])
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        WORK[options.peak](tensors)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    WORK[options.peak](draw(argparse.Namespace(**vars(options) | {"heads": options.kv_heads}), 16))
    Path("/proc/self/clear_refs").write_text("5")
    before = largest_resident()
    WORK[options.peak](tensors)
    return (largest_resident() - before) / MIB


def peak(arm: str, time: int, options: argparse.Namespace) -> float:
    """``own_peak`` of a fresh process."""
    extents = {"heads": options.heads, "kv-heads": options.kv_heads, "width": options.width, "time": time}
    command = [sys.executable, __file__, "--peak", arm, "--device", options.device]
    command += [word for name, value in extents.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, env=os.environ | paths(), capture_output=True, text=True, check=True)
    return float(done.stdout)


def paths() -> dict[str, str]:
    """So that a fresh process finds what this one found."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def row(time: int, options: argparse.Namespace) -> str:
    """One line of the table."""
    names = [name for name in ARMS if name != "maps" or time <= options.maps_until]
    tensors = draw(options, time)
    seconds = alternate({n: partial(WORK[n], tensors) for n in names}, options.rounds, options.device)
    cells = [f"{1e3 * sorted(seconds['blocks'])[options.rounds // 2]:.1f}"]
    for arm in ("maps", "sdpa"):
        shown = arm in names
        cells.append(
            "×{1:.2f} ({0:.2f}–{2:.2f})".format(*quartiles(seconds["blocks"], seconds[arm])) if shown else "–"
        )
    cells += [f"{peak(arm, time, options):.0f}" if arm in names else "–" for arm in ARMS]
    return f"| {time} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--time", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--maps-until", type=int, default=2048)
    parser.add_argument("--peak", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(own_peak(options))
        return
    print(
        f"torch {torch.__version__}, {options.device}, {options.heads} query heads on "
        f"{options.kv_heads} key heads of {options.width}, float32\n\n"
        "| positions | blocks, ms | blocks / maps | blocks / SDPA | blocks, MiB | maps, MiB | SDPA, MiB |\n"
        "|---|---|---|---|---|---|---|"
    )
    for time in options.time:
        print(row(time, options), flush=True)


if __name__ == "__main__":
    main()
