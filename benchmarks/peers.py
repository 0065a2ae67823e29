"""kava's step against the nearest one of other packages: TRL's GOLD trainer, torchdistill's box.

The same models with random weights and the same tokens, alternated in one process. A peer that is not
installed, or does not run here, is a line that says why: ``pip install --no-deps`` the group ``peers``.

    python benchmarks/peers.py [--rounds 10] [--size small medium] [--peer TRL torchdistill] [--device …]
"""

from __future__ import annotations

import argparse
import importlib
import os
from statistics import median

import memory
import torch
from alternated import alternate, quartiles
from bench import SIZES

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
PEERS = {"TRL": "peer_gold", "torchdistill": "peer_torchdistill"}


def row(peer: str, size: str, options: argparse.Namespace) -> str:
    """One line of the table."""
    bench, work = importlib.import_module(PEERS[peer]).make(SIZES[size], options.device)
    seconds = alternate(work | {"floor": bench.floor}, options.rounds, options.device)
    pairs = ((peer, "floor"), ("kava", "floor"), ("kava", peer))
    cells = ["{1:.3f} ({0:.3f}–{2:.3f})".format(*quartiles(seconds[a], seconds[b])) for a, b in pairs]
    asked = ("--size", size, "--peer", peer, "--device", options.device)
    peaks = [f"{memory.fresh(__file__, '--peak', form, *asked):.0f}" for form in ("floor", peer, "kava")]
    floor = f"{1e3 * median(seconds['floor']):.0f}"
    return f"| {' | '.join([size, peer, *cells, floor, *peaks])} |"


def peak(form: str, peer: str, size: str, device: str) -> float:
    """MiB of the second step in this process."""
    bench, work = importlib.import_module(PEERS[peer]).make(SIZES[size], device)
    chosen = (work | {"floor": bench.floor})[form]
    chosen()
    return memory.growth(chosen, device)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", choices=SIZES, nargs="+", default=["small", "medium"])
    parser.add_argument("--peer", choices=PEERS, nargs="+", default=list(PEERS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(peak(options.peak, options.peer[0], options.size[0], options.device))
        return
    print(
        f"torch {torch.__version__}, {options.device}, 1 thread, {options.rounds} rounds\n\n"
        "| size | peer | peer / floor | kava / floor | kava / peer "
        "| floor, ms | floor, MiB | peer, MiB | kava, MiB |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for size in options.size:
        for peer in options.peer:
            try:
                print(row(peer, size, options), flush=True)
            except ImportError as error:
                print(f"| {size} | {peer} | skipped: {type(error).__name__}: {error} |", flush=True)


if __name__ == "__main__":
    main()
