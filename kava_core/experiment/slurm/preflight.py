"""Checks before anything is queued: what would fail after hours in the queue fails here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kava_core.console import size_text
from kava_core.errors import KavaError
from kava_core.experiment.slurm import disk
from kava_core.experiment.slurm.mapping import launches_of
from kava_core.experiment.slurm.present import missing_data, missing_models, offline
from kava_core.experiment.slurm.resources import Resources
from kava_core.experiment.slurm.scheduler import ask
from kava_core.experiment.slurm.size import Size, size_of
from kava_core.runs.folder import Folder
from kava_core.specfile.sections.pipeline import PipelineSpec

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what is wrong (nothing if it is right), and what was found."""

    name: str
    faults: Sequence[str]
    found: str = ""

    def __str__(self) -> str:
        told = f"FAILED {'; '.join(self.faults)}" if self.faults else f"ok     {self.found}"
        return f"{self.name:<10} {told}".rstrip()


class Preflight:
    """Looks at the runs that are to be queued.

    Args:
        runs: at least one.
        resources: what each gets.
        script: the text for sbatch.
        gpu_memory: GiB of a device; None: not known.
    """

    def __init__(
        self, runs: Sequence[Folder], resources: Resources, script: str, gpu_memory: float | None = None
    ) -> None:
        self.runs, self.resources, self.script, self.gpu_memory = runs, resources, script, gpu_memory

    def __iter__(self) -> Iterator[Check]:
        """The checks, quick ones first. None raises a KavaError: it becomes a failure."""
        for name, check in self._checks().items():
            try:
                yield check()
            except KavaError as error:
                yield Check(name, [str(error)])

    def _checks(self) -> dict[str, Callable[[], Check]]:
        memory = {} if self.gpu_memory is None else {"memory": self._memory}
        quick = {"write": self._write, "data": self._data, "models": self._models, "gpus": self._gpus}
        return {**quick, "disk": self._disk, **memory, "sbatch": self._sbatch}

    @cached_property
    def _specs(self) -> dict[str, PipelineSpec]:
        return {run.variant: run.spec for run in self.runs}

    @cached_property
    def _sizes(self) -> dict[str, Size]:
        return {name: size_of(spec, self.resources.processes) for name, spec in self._specs.items()}

    @property
    def _output(self) -> Path:
        return launches_of(self.runs[0].spec).parent

    def _write(self) -> Check:
        disk.write_test(self._output)
        return Check("write", [], str(self._output))

    def _data(self) -> Check:
        return Check("data", missing_data(self._specs.values(), Path.cwd()), "readable")

    def _models(self) -> Check:
        found = "on this disk" if offline() else "local folders whole; HF_HUB_OFFLINE is not set"
        return Check("models", missing_models(self._specs.values()), found)

    def _gpus(self) -> Check:
        faults = dict.fromkeys(
            fault for run in self.runs for fault in device_faults(run.spec, self.resources)
        )
        faults |= dict.fromkeys(fault for run in self.runs for fault in self._begun(run))
        asked = self.resources
        found = f"processes: {asked.processes} (nodes: {asked.nodes}, GPUs of each: {asked.gpus})"
        return Check("gpus", list(faults), found)

    def _begun(self, run: Folder) -> Iterator[str]:
        """A run goes on with as many processes as it began with."""
        begun = run.record().get("world_size", self.resources.processes)
        if begun != self.resources.processes:
            yield f"{run.label} was begun by {begun} processes, not {self.resources.processes}"

    def _disk(self) -> Check:
        needed = sum(self._sizes[run.variant].disk for run in self.runs)
        free, kind = disk.room(self._output)
        told = f"{size_text(free)} {kind}, checkpoints of {len(self.runs)} runs need {size_text(needed)}"
        return Check("disk", [] if needed <= free else [told], told)

    def _memory(self) -> Check:
        """The largest variant, by the estimate of ``kava plan`` at the longest text."""
        assert self.gpu_memory is not None
        name, size = max(self._sizes.items(), key=lambda item: item[1].memory)
        told = f"{name} needs about {size_text(size.memory)} of {self.gpu_memory:g} GiB"
        return Check("memory", [] if size.memory <= self.gpu_memory * GIB else [told], told)

    def _sbatch(self) -> Check:
        ask("sbatch", "--test-only", text=self.script)
        return Check("sbatch", [], "would take the job")


def device_faults(spec: PipelineSpec, resources: Resources) -> Iterator[str]:
    """What a spec asks of devices that the job would not have."""
    if resources.gpus == 0 and spec.train.precision == "fp16":
        yield "train.precision: fp16 needs a GPU"
    for where, model in (("student", spec.student), *((f"teacher {t.name}", t) for t in spec.teachers)):
        if resources.gpus == 0 and model.attention == "flash_attention_2":
            yield f"{where}: flash_attention_2 needs a GPU"
    for teacher in spec.teachers:
        device, _, number = teacher.placement.partition(":")
        if device == "cuda" and int(number or 0) >= resources.gpus:
            yield f"teacher {teacher.name}: placement {teacher.placement} needs --gpus {int(number or 0) + 1}"
