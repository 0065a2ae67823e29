"""Heads and width of a teacher's keys and values: batched products against loops, structured against flat.

    python benchmarks/projection.py [--rounds 15] [--time 128] [--device cpu|cuda]

Loops: one nn.Linear for the head mix and one for the width of every layer, each head on its own. All arms of
a table are timed in one process, one after another in every round and backwards in every other round; ratios
are medians over rounds of the round's own ratio.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from alternated import alternate, quartiles
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kava_core.protocols.axes import Geometry
from kava_plugins.dim_projectors import LinearConfig
from kava_plugins.head_adapters import FlatConfig, StructuredConfig

PARTS = ("keys", "values")
PAIRS = {
    "4 × 128 → 2 × 64, 24 layers": (24, (4, 128), (2, 64)),
    "28 × 128 → 2 × 64, 24 layers": (24, (28, 128), (2, 64)),
    "32 × 128 → 16 × 64, 24 layers": (24, (32, 128), (16, 64)),
}


class Batched(nn.Module):
    """A head adapter and the linear projector; layers and heads as batched products."""

    def __init__(
        self, adapter: StructuredConfig | FlatConfig, *, teacher: Geometry, student: Geometry
    ) -> None:
        super().__init__()
        self.adapter = adapter.build(teacher=teacher, student=student)
        views = {"teacher": self.adapter.teacher_view, "student": self.adapter.student_view}
        self.projector = LinearConfig().build(**views)

    def forward(self, cache: dict[str, Tensor]) -> list[Tensor]:
        """Keys and values as the student's."""
        return [self.projector(self.adapter(x, part), part) for part, x in cache.items()]


class LoopedPart(nn.Module):
    """The same maps of keys or values as modules of their own, layer by layer and head by head."""

    def __init__(self, mix: Tensor, widths: Tensor) -> None:
        super().__init__()
        self.mixes = nn.ModuleList(_module(mix) for _ in widths)
        self.widths = nn.ModuleList(_module(width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        """One part as the student's."""
        layers = []
        for layer, (mix, width) in enumerate(zip(self.mixes, self.widths, strict=True)):
            mixed = mix(x[:, layer].transpose(1, 3)).transpose(1, 3)
            layers.append(torch.stack([width(mixed[:, head]) for head in range(mixed.shape[1])], 1))
        return torch.stack(layers, 1)


def _module(matrix: Tensor) -> nn.Linear:
    module = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    module.weight.data.copy_(matrix)
    return module


class Looped(nn.Module):
    """What ``Batched`` computes, by loops."""

    def __init__(self, batched: Batched) -> None:
        super().__init__()
        mix, projector = batched.adapter.keys_mix[0], batched.projector
        self.parts = nn.ModuleList(LoopedPart(mix, getattr(projector, part)[:, 0]) for part in PARTS)

    def forward(self, cache: dict[str, Tensor]) -> list[Tensor]:
        """Keys and values as the student's."""
        return [part(x) for part, x in zip(self.parts, cache.values(), strict=True)]


class _Calls(TorchDispatchMode):
    """Counts operators, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return function(*args, **(kwargs or {}))


def forward(module: nn.Module, cache: dict[str, Tensor]) -> None:
    """Without gradients."""
    with torch.no_grad():
        module(cache)


def step(module: nn.Module, cache: dict[str, Tensor]) -> None:
    """Forward and backward, down to the weights."""
    module.zero_grad(set_to_none=True)
    sum(one.square().sum() for one in module(cache)).backward()


def operators(work: Callable[[], None]) -> int:
    """How many operators it calls, views included."""
    with _Calls() as calls:
        work()
    return calls.count


def ratio(over: list[float], under: list[float]) -> str:
    """Median of the rounds' ratios, and their quartiles."""
    low, middle, high = quartiles(over, under)
    return f"×{middle:.2f} ({low:.2f}–{high:.2f})"


def sides(name: str) -> tuple[Geometry, Geometry]:
    """Both geometries of a row."""
    layer, (t_head, t_dim), (head, dim) = PAIRS[name]
    teacher = Geometry(layer=layer, head=t_head, dim=t_dim, qhead=0, hidden=t_head * t_dim)
    return teacher, teacher.with_(head=head, dim=dim)


def draw(teacher: Geometry, batch: int, time: int) -> dict[str, Tensor]:
    """Random keys and values of a teacher."""
    shape = (batch, teacher.layer, teacher.head, time, teacher.dim)
    return {part: torch.randn(shape) for part in PARTS}


def loops_row(name: str, options: argparse.Namespace) -> str:
    """Loops against batched products, forward and forward with backward."""
    teacher, student = sides(name)
    batched = Batched(StructuredConfig(trainable=True), teacher=teacher, student=student)
    looped = Looped(batched)
    cache = draw(teacher, options.batch, options.time)
    for mine, theirs in zip(batched(cache), looped(cache), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    cells = []
    for work in (forward, step):
        modules = {"looped": looped, "batched": batched}
        arms = {name: lambda m=m, w=work: w(m, cache) for name, m in modules.items()}
        slow, fast = alternate(arms, options.rounds, options.device).values()
        calls = " → ".join(str(operators(arm)) for arm in arms.values())
        cells.append(f"{1e3 * statistics.median(fast):.1f} | {ratio(slow, fast)} | {calls}")
    return f"| {name} | {' | '.join(cells)} |"


def flat_row(name: str, options: argparse.Namespace) -> str:
    """Flat against structured: parameters, forward, forward with backward."""
    teacher, student = sides(name)
    modules = [
        Batched(adapter, teacher=teacher, student=student) for adapter in (FlatConfig(), StructuredConfig())
    ]
    cache = draw(teacher, options.batch, options.time)
    sizes = " | ".join(f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f} M" for m in modules)
    cells = []
    for work in (forward, step):
        arms = {str(place): lambda m=m, w=work: w(m, cache) for place, m in enumerate(modules)}
        cells.append(ratio(*alternate(arms, options.rounds, options.device).values()))
    return f"| {name} | {sizes} | {' | '.join(cells)} |"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--time", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_device(options.device)
    print(f"torch {torch.__version__}, {options.device}, batch {options.batch}, {options.time} positions\n")
    print("| loops / batched | forward, ms | ratio | operators | with backward, ms | ratio | operators |")
    print("|---|---|---|---|---|---|---|")
    for name in PAIRS:
        print(loops_row(name, options), flush=True)
    print("\n| flat / structured | flat | structured | forward | with backward |\n|---|---|---|---|---|")
    for name in PAIRS:
        print(flat_row(name, options), flush=True)


if __name__ == "__main__":
    main()
