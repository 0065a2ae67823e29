"""Write what a job asks of SLURM as ``#SBATCH`` lines. Nothing gets in that sbatch might read otherwise."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from kava_core.errors import SpecError

UNQUOTED = re.compile(r"[\w./:=,@%+\-\[\]&|*()!~]+", re.ASCII)
"""Options that need no quotes."""
QUOTABLE = re.compile(r"[^\x00-\x1f\x7f\"'\\]+")
"""Options that mean themselves in double quotes."""

OWN_OPTIONS = frozenset(
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
    """What one run gets, which is one element of the array."""

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
        """Return the processes on each node: one for each GPU."""
        return max(self.gpus, 1)

    @property
    def processes(self) -> int:
        """Return the processes of a run."""
        return self.nodes * self.tasks

    def directives(self) -> Iterator[str]:
        """Yield every option as an ``#SBATCH`` line.

        Raises:
            SpecError: an option that no such line can hold, or that the script sets itself.
        """
        options = {
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks,
            "cpus-per-task": self.cpus,
            "gpus-per-node": self.gpus or None,
            "mem": self.memory,
        }
        for name, value in options.items():
            if value is not None:
                yield directive_line(f"--{name}={value}")
        for option in self._extra_options():
            yield directive_line(option)

    def _extra_options(self) -> list[str]:
        """Return the further options, each with its value."""
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
            _refuse_own_option(option)
        return options


def _refuse_own_option(option: str) -> None:
    name = option[2:].partition("=")[0] if option.startswith("--") else option[1:2]
    if name in OWN_OPTIONS:
        raise SpecError(f"--extra: {option}: kava launch sets this itself")


def directive_line(option: str) -> str:
    """Return an option as an ``#SBATCH`` line, its value in double quotes if it needs them.

    Raises:
        SpecError: it has characters that no such line can hold.
    """
    if UNQUOTED.fullmatch(option):
        return f"#SBATCH {option}"
    if not QUOTABLE.fullmatch(option):
        raise SpecError(f"{option!r}: no quotes, backslashes or control characters in options of sbatch")
    name, equals, value = option.partition("=")
    return f'#SBATCH {name}{equals}"{value}"'
