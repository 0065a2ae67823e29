"""kava's step against the two dozen lines that a PyTorch programmer writes for the same loss.

Mean squared difference of keys and values, one ``nn.Linear`` for each layer and part, layers at the same
depth, teacher and student with the same tokens, no padding, no masks: all that the hand-written step leaves
out costs kava time and brings nothing here. Both compute the same loss from the same weights, which is
checked. The hand-written teacher runs to its end, with or without the LM head; kava's stops early.

    python benchmarks/handwritten.py [--rounds 10] [--size small medium] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import memory
import torch
import torch.nn.functional as F
from alternated import alternate, quartiles
from bench import SIZES, Bench, make_spec
from naive import hooked
from torch import Tensor, nn

Taken = list[tuple[Tensor, Tensor]]
"""Keys and values of every layer, ``batch time (head dim)``."""


def from_cache(model: nn.Module, **inputs: Any) -> tuple[Any, Taken]:
    """Output and rotated keys and values."""
    output = model(**inputs, use_cache=True)
    layers = output.past_key_values.layers
    return output, [tuple(x.transpose(1, 2).flatten(2) for x in (one.keys, one.values)) for one in layers]


def from_hooks(model: nn.Module, **inputs: Any) -> tuple[Any, Taken]:
    """Output and what the projections gave, before its rotation."""
    with hooked(getattr(model, "model", model), ("keys", "values")) as seen:
        output = model(**inputs, use_cache=False)
    layers = range(len(seen) // 2)
    return output, [(seen["keys", layer], seen["values", layer]) for layer in layers]


class HandWritten(nn.Module):
    """Models and linear maps; the forward pass is cross-entropy + the squared differences."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, take: Callable[..., Any], *, head: bool
    ) -> None:
        super().__init__()
        self.student, self.take = student, take
        self.__dict__["teacher"] = teacher if head else teacher.model
        layers, t_layers = student.config.num_hidden_layers, teacher.config.num_hidden_layers
        self.sources = [(i + 1) * t_layers // layers - 1 for i in range(layers)]
        width, t_width = (m.model.layers[0].self_attn.k_proj.out_features for m in (student, teacher))
        self.keys = nn.ModuleList(nn.Linear(t_width, width, bias=False) for _ in range(layers))
        self.values = nn.ModuleList(nn.Linear(t_width, width, bias=False) for _ in range(layers))

    def forward(self, ids: Tensor, t_ids: Tensor) -> Tensor:
        """The loss of a batch."""
        with torch.no_grad():
            _, theirs = self.take(self.teacher, input_ids=t_ids)
        output, ours = self.take(self.student, input_ids=ids, labels=ids)
        loss = torch.zeros((), device=ids.device)
        for (keys, values), source, k, v in zip(ours, self.sources, self.keys, self.values, strict=True):
            loss = loss + F.mse_loss(keys, k(theirs[source][0])) + F.mse_loss(values, v(theirs[source][1]))
        return output.loss + loss / len(ours)


class Step:
    """One optimizer step of the hand-written form."""

    def __init__(self, bench: Bench, take: Callable[..., Any], *, head: bool) -> None:
        self.bench = bench
        self.model = HandWritten(bench.student, bench.teachers[0].model, take, head=head).to(bench.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self._copy_weights()

    @torch.no_grad()
    def _copy_weights(self) -> None:
        projector = self.bench.pipeline.teachers[0].dim_projector
        for part in ("keys", "values"):
            for linear, matrix in zip(getattr(self.model, part), getattr(projector, part), strict=True):
                linear.weight.copy_(matrix[0])

    def loss(self) -> Tensor:
        """The loss of the bench's batch."""
        return self.model(self.bench.ours["input_ids"], self.bench.theirs["t0"]["input_ids"])

    def __call__(self) -> None:
        """Loss and update."""
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


FORMS = {"cache, rotated keys": (from_cache, "keep"), "hooks, keys before rotation": (from_hooks, "strip")}
WORK = ("kava", "hand", "hand with LM head")


def make(form: str, size: str, device: str) -> tuple[Bench, dict[str, Callable[[], object]]]:
    """The bench and its steps: kava's, and hand-written ones without and with the teacher's LM head."""
    take, rotary = FORMS[form]
    align = {"head_adapter": "flat", "time_warper": "identity", "dim_projector": "linear"}
    spec = make_spec(SIZES[size], [{"name": "mse"}], align=align, rotary=rotary)
    bench = Bench(spec, SIZES[size], device, longer=1.0)
    hands = [Step(bench, take, head=head) for head in (False, True)]
    for hand in hands:
        torch.testing.assert_close(bench.loss(), hand.loss(), rtol=1e-5, atol=0)
    return bench, dict(zip(WORK, (bench.step, *hands), strict=True))


def peak(name: str, form: str, size: str, device: str) -> float:
    """MiB of one step in this process, after a tiny one."""
    bench, work = make(form, size, device)
    bench.show(1, 16)
    work[name]()
    bench.show(SIZES[size]["batch"], SIZES[size]["time"])
    return memory.growth(work[name], device)


def row(form: str, size: str, options: argparse.Namespace) -> str:
    """One line of the table."""
    _, work = make(form, size, options.device)
    seconds = alternate(work, options.rounds, options.device)
    cells = ["{1:.3f} ({0:.3f}–{2:.3f})".format(*quartiles(seconds["kava"], seconds[x])) for x in WORK[1:]]
    asked = ("--size", size, "--form", form, "--device", options.device)
    peaks = [f"{memory.fresh(__file__, '--peak', name, *asked):.0f}" for name in WORK]
    return f"| {' | '.join([size, form, *cells, *peaks])} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", choices=SIZES, nargs="+", default=["small", "medium"])
    parser.add_argument("--form", choices=FORMS, nargs="+", default=list(FORMS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", choices=WORK, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(peak(options.peak, options.form[0], options.size[0], options.device))
        return
    print(
        f"torch {torch.__version__}, {options.device}, 1 thread, {options.rounds} rounds\n\n"
        "| size | hand-written from | kava / hand | kava / hand with LM head "
        "| kava, MiB | hand, MiB | with LM head, MiB |\n"
        "|---|---|---|---|---|---|---|"
    )
    for size in options.size:
        for form in options.form:
            print(row(form, size, options), flush=True)


if __name__ == "__main__":
    main()
