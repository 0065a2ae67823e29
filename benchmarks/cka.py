"""Debiased CKA of all pairs of layers: Gram matrices made once and one product, against a loop over pairs.

    python benchmarks/cka.py [--rounds 3] [--layers 24] [--teacher-layers 28] [--device cpu|cuda]

``pairwise``: for every pair of layers both Gram matrices are made, centred and multiplied, as scripts do.
``grams``: Gram matrices are made once for every layer, pairs in a loop. Both see all rows at once, kava
minibatches of 256. Arms of a row run in one process, one after another in every round and backwards in every
other round; ratios are medians over rounds. More rows are timed with a quarter of the layers, in one round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from alternated import alternate, ratio
from torch import Tensor

from kava_core.kv.maths.cka import StreamedCKA

MINIBATCH = 256


def centred(x: Tensor) -> Tensor:
    """U-centred Gram matrix of one layer (Song et al. 2012)."""
    n = x.shape[0]
    gram = (x @ x.T).fill_diagonal_(0)
    rows, total = gram.sum(1), gram.sum()
    gram = gram - (rows[:, None] + rows[None]) / (n - 2) + total / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0)


def hsic(k: Tensor, m: Tensor) -> Tensor:
    """Unbiased HSIC of two centred Gram matrices."""
    return (k * m).sum() / (k.shape[0] * (k.shape[0] - 3))


def pairwise(teacher: Tensor, student: Tensor) -> Tensor:
    """CKA of all rows at once, every pair by itself."""

    def cka(s: Tensor, t: Tensor) -> Tensor:
        k, m = centred(s), centred(t)
        return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()

    return torch.stack([torch.stack([cka(s, t) for t in teacher]) for s in student])


def grams(teacher: Tensor, student: Tensor) -> Tensor:
    """CKA of all rows at once, from Gram matrices that are made once."""
    ks, ms = [centred(s) for s in student], [centred(t) for t in teacher]
    own, theirs = [hsic(k, k) for k in ks], [hsic(m, m) for m in ms]
    return torch.stack(
        [
            torch.stack([hsic(k, m) / (a * b).sqrt() for m, b in zip(ms, theirs, strict=True)])
            for k, a in zip(ks, own, strict=True)
        ]
    )


def streamed(teacher: Tensor, student: Tensor) -> Tensor:
    """CKA over minibatches."""
    stream = StreamedCKA(MINIBATCH)
    stream.add(teacher, student)
    return stream.similarity()


def compare(teacher: Tensor, student: Tensor, rounds: int) -> None:
    """One row of the table."""
    arms = {"pairwise": pairwise, "grams": grams, "kava": streamed}
    work: dict[str, Callable[[], Tensor]] = {
        name: partial(arm, teacher, student) for name, arm in arms.items()
    }
    found = alternate(work, rounds, teacher.device.type, warm=int(rounds > 1))
    over = " | ".join(f"×{ratio(found[arm], found['kava']):.1f}" for arm in ("pairwise", "grams"))
    layers, rows = f"{len(student)} × {len(teacher)}", teacher.shape[1]
    print(f"| {layers} | {rows} | {1000 * min(found['kava']):.0f} | {over} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--teacher-layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--teacher-width", type=int, default=3584)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = torch.Generator().manual_seed(0)
    print(f"torch {torch.__version__}, {options.device}, widths {options.width} × {options.teacher_width}")
    print("| layers | rows | kava, ms | pairwise / kava | grams / kava |\n|---|---|---|---|---|")
    for rows, share, rounds in ((MINIBATCH, 1, options.rounds), (options.rows, 4, 1)):
        teacher = torch.randn(options.teacher_layers // share, rows, options.teacher_width, generator=made)
        student = torch.randn(options.layers // share, rows, options.width, generator=made)
        compare(teacher.to(options.device), student.to(options.device), rounds)


if __name__ == "__main__":
    main()
