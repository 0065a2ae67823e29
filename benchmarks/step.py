"""The whole training step over its floor: kava's, and the same written naively.

Floor = every teacher's forward pass (no LM head) + the student's forward, backward and optimizer step.
The three are alternated in one process; CPU time, or wall time on a GPU; medians of ratios over rounds.
Memory is what one step takes beside models and optimizer, in a process of its own.

    python benchmarks/step.py [--rounds 10] [--size small medium long] [--arm NAME …] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import memory
import torch
from alternated import alternate, quartiles
from bench import SIZES, Bench, make_spec
from naive import Naive

MERCATOR = {"name": "mercator"}
ARMS = {
    "K/V, 1 teacher": (1.02, 1, [MERCATOR]),
    "K/V, 2 teachers": (1.03, 2, [MERCATOR]),
    "K/V + attention KL on 3 layers": (1.05, 1, [MERCATOR, {"name": "attention_kl"}]),
    "K/V by smooth_l1, 1 teacher": (1.02, 1, [{"name": "smooth_l1", "scale": "batch"}]),
    "relation of V, 1 teacher": (1.02, 1, [{"name": "relation"}]),
}
"""Mark of the step over the floor; teachers; losses. Only the first three have a naive form."""
FORMS = ("floor", "kava", "naive")


def make(arm: str, size: str, device: str) -> tuple[Bench, dict[str, Callable[[], object]]]:
    """The bench and its steps by form; AssertionError where kava's and the naive loss differ."""
    _, teachers, losses = ARMS[arm]
    last = SIZES[size]["student"][1] - 1
    three = {"layers": [0, last // 2, last]}
    losses = [loss | (three if loss["name"] == "attention_kl" else {}) for loss in losses]
    bench = Bench(make_spec(SIZES[size], losses, teachers=teachers), SIZES[size], device)
    work = {"floor": bench.floor, "kava": bench.step}
    if MERCATOR in losses:
        naive = Naive(bench)
        torch.testing.assert_close(bench.loss(), naive.loss(), rtol=1e-5, atol=0)
        work["naive"] = naive.step
    return bench, work


def peak(form: str, arm: str, size: str, device: str) -> float:
    """MiB of one step in this process, after a tiny one."""
    bench, work = make(arm, size, device)
    bench.show(1, 16)
    work[form]()
    bench.show(SIZES[size]["batch"], SIZES[size]["time"])
    return memory.growth(work[form], device)


def row(arm: str, size: str, options: argparse.Namespace) -> str:
    """One line of the table."""
    _, work = make(arm, size, options.device)
    seconds = alternate(work, options.rounds, options.device)
    cells = [
        "{1:.3f} ({0:.3f}–{2:.3f})".format(*quartiles(seconds[x], seconds["floor"])) if x in work else "–"
        for x in FORMS[1:]
    ]
    asked = ("--size", size, "--arm", arm, "--device", options.device)
    peaks = [f"{memory.fresh(__file__, '--peak', x, *asked):.0f}" if x in work else "–" for x in FORMS]
    floor = f"{1e3 * median(seconds['floor']):.0f}"
    return f"| {' | '.join([size, arm, f'{ARMS[arm][0]:.2f}', *cells, floor, *peaks])} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", choices=SIZES, nargs="+", default=["small", "medium"])
    parser.add_argument("--arm", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(peak(options.peak, options.arm[0], options.size[0], options.device))
        return
    print(
        f"torch {torch.__version__}, {options.device}, 1 thread, {options.rounds} rounds\n\n"
        "| size | arm | mark | kava / floor | naive / floor "
        "| floor, ms | floor, MiB | kava, MiB | naive, MiB |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for size in options.size:
        for arm in options.arm:
            print(row(arm, size, options), flush=True)


if __name__ == "__main__":
    main()
