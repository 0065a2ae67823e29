"""The KV losses layer by layer while the teacher runs (``train.stream``) against all layers at once.

Time: steps alternated in one process, CPU time (wall time on a GPU), medians of ratios over rounds. Memory:
what one step, or the teacher's pass and alignment alone, takes beside models and optimizer, in a process of
its own.

    python benchmarks/stream.py [--rounds 5] [--time 2048 8192] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
from functools import partial

import memory
import torch
from alternated import alternate, quartiles
from bench import Bench, Size, make_spec

from kava_core.protocols.timeline import Timeline

SIZE: Size = {"student": (256, 8, 4, 2), "teachers": [(512, 24, 8, 8)], "batch": 1, "time": 64}
FORMS = ("floor", "at once", "streamed")
TARGETS = ("targets at once", "targets streamed")
LOSSES = [{"name": "mercator"}]


ALIGN = {"calibrated": {}, "trained": {"dim_projector": "linear"}, "lifted": {"direction": "to_teacher"}}


def make(align: str, device: str) -> Bench:
    """A teacher with 24 layers, of which 8 are read, 8 key heads of 64; a student with 8 layers, 2 of 64."""
    return Bench(make_spec(SIZE, LOSSES, align=ALIGN[align]), SIZE, device, longer=1.0)


def step(bench: Bench, form: str) -> None:
    """One step of one form."""
    bench.distiller.choose_alignment(stream=form == "streamed")
    (bench.floor if form == "floor" else bench.step)()


@torch.no_grad()
def targets(bench: Bench, form: str) -> None:
    """The teacher's pass and its alignment, nothing else."""
    bench.distiller.choose_alignment(stream=form == TARGETS[1])
    bench.distiller.alignment.targets.read_targets(
        bench.theirs, Timeline.from_batch(bench.ours), bench.pipeline
    )


def peak(form: str, align: str, time: int, device: str) -> float:
    """MiB of one step, or of its targets, in this process, after a tiny one."""
    bench, work = make(align, device), targets if form in TARGETS else step
    work(bench, form)
    bench.show(1, time)
    return memory.growth(partial(work, bench, form), device)


def row(align: str, time: int, options: argparse.Namespace) -> str:
    """One line of the table."""
    bench = make(align, options.device)
    bench.show(1, time)
    work = {form: partial(step, bench, form) for form in FORMS}
    seconds = alternate(work, options.rounds, options.device)
    cells = [
        "{1:.3f} ({0:.3f}–{2:.3f})".format(*quartiles(seconds[form], seconds["floor"])) for form in FORMS[1:]
    ]
    asked = ("--align", align, "--time", str(time), "--device", options.device)
    peaks = [f"{memory.fresh(__file__, '--peak', form, *asked):.0f}" for form in FORMS + TARGETS]
    return f"| {' | '.join([align, f'{time:,}', *cells, *peaks])} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--time", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--align", choices=ALIGN, nargs="+", default=list(ALIGN))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", choices=FORMS + TARGETS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(peak(options.peak, options.align[0], options.time[0], options.device))
        return
    print(
        f"torch {torch.__version__}, {options.device}, 1 thread, {options.rounds} rounds\n\n"
        "| alignment | tokens | at once / floor | streamed / floor | floor, MiB | at once | streamed | "
        "targets at once | targets streamed |\n|---|---|---|---|---|---|---|---|---|"
    )
    for align in options.align:
        for time in options.time:
            print(row(align, time, options), flush=True)


if __name__ == "__main__":
    main()
