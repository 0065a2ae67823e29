"""What a job asks of SLURM, as ``#SBATCH`` lines. Nothing gets in that sbatch might read otherwise."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from kava_core.errors import SpecError

PLAIN = re.compile(r"[\w./:=,@%+\-\[\]&|*()!~]+", re.ASCII)
"""Options that need no quotes."""
QUOTABLE = re.compile(r"[^\x00-\x1f\x7f\"'\\]+")
"""Options that mean themselves in double quotes."""

OURS = frozenset(
    [
        "job-name",
        "J",
        "array",
        "a",
        "output",
        "o",
        "error",
        "e",
        "open-mode",
        "requeue",
        "no-requeue",
        "signal",
        "nodes",
        "N",
        "ntasks",
        "n",
        "ntasks-per-node",
        "cpus-per-task",
        "c",
        "gpus-per-node",
        "chdir",
        "D",
        "wrap",
        "test-only",
        "parsable",
    ]
)
"""Options that the script sets itself, or that would break it."""


@dataclass(frozen=True)
class Resources:
    """For one run, which is one element of the array."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    """As sbatch takes it: ``4:00:00``, ``1-12``."""
    gpus: int = 1
    """On each node; 0: one process on the CPU."""
    nodes: int = 1
    cpus: int | None = None
    """For each process."""
    memory: str | None = None
    """Main memory of each node, such as ``64G``."""
    array_limit: int | None = None
    """Runs at the same time."""
    extra: str = ""
    """Further sbatch options, as on its command line."""

    @property
    def tasks(self) -> int:
        """Processes on each node: one for each GPU."""
        return max(self.gpus, 1)

    @property
    def processes(self) -> int:
        """Processes of a run."""
        return self.nodes * self.tasks

    def directives(self) -> Iterator[str]:
        """Every option as an ``#SBATCH`` line; SpecError for one that no such line can hold."""
        given = {
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks,
            "cpus-per-task": self.cpus,
            "gpus-per-node": self.gpus or None,
            "mem": self.memory,
        }
        for name, value in given.items():
            if value is not None:
                yield directive(f"--{name}={value}")
        yield from (directive(option) for option in self._extra())

    def _extra(self) -> list[str]:
        """The further options, each with its value; SpecError for those that the script sets itself."""
        try:
            words = shlex.split(self.extra)
        except ValueError as error:
            raise SpecError(f"--extra: {error}") from error
        options: list[str] = []
        for word in words:
            if word.startswith("-"):
                options.append(word)
            elif options and "=" not in options[-1]:
                options[-1] += ("=" if options[-1].startswith("--") else "") + word
            else:
                raise SpecError(f"--extra: {word!r} is no option of sbatch")
        for option in options:
            _refuse_ours(option)
        return options


def _refuse_ours(option: str) -> None:
    name = option[2:].partition("=")[0] if option.startswith("--") else option[1:2]
    if name in OURS:
        raise SpecError(f"--extra: {option}: kava launch sets this itself")


def directive(option: str) -> str:
    """An ``#SBATCH`` line, the value in double quotes where it needs them."""
    if PLAIN.fullmatch(option):
        return f"#SBATCH {option}"
    if not QUOTABLE.fullmatch(option):
        raise SpecError(f"{option!r}: no quotes, backslashes or control characters in options of sbatch")
    name, equals, value = option.partition("=")
    return f'#SBATCH {name}{equals}"{value}"'
