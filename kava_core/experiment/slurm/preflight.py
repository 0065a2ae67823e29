"""Check before anything is queued: what would fail after hours in the queue fails here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kava_core.console import size_text
from kava_core.errors import KavaError
from kava_core.experiment.slurm import disk
from kava_core.experiment.slurm.local_files import hub_is_offline, missing_data, missing_models
from kava_core.experiment.slurm.mapping import launches_folder
from kava_core.experiment.slurm.resources import Resources
from kava_core.experiment.slurm.run_size import RunSize, estimate_size
from kava_core.experiment.slurm.scheduler import run_command
from kava_core.runs.folder import Folder
from kava_core.specfile.sections.models import ModelSpec
from kava_core.specfile.sections.pipeline import PipelineSpec

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line: what was checked, what is wrong (nothing if it is right), and what is so."""

    name: str
    faults: Sequence[str]
    finding: str = ""

    def __str__(self) -> str:
        outcome = f"FAILED {'; '.join(self.faults)}" if self.faults else f"ok     {self.finding}"
        return f"{self.name:<10} {outcome}".rstrip()


class Preflight:
    """Checks of the runs that are to be queued.

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
        """Yield the checks, quick ones first. A KavaError becomes a check that failed."""
        for name, check in self._checks().items():
            try:
                yield check()
            except KavaError as error:
                yield Check(name, [str(error)])

    def _checks(self) -> dict[str, Callable[[], Check]]:
        checks = {
            "write": self._check_output,
            "data": self._check_data,
            "models": self._check_models,
            "gpus": self._check_devices,
            "disk": self._check_disk,
        }
        if self.gpu_memory is not None:
            checks["memory"] = self._check_memory
        checks["sbatch"] = self._check_script
        return checks

    @cached_property
    def _specs(self) -> dict[str, PipelineSpec]:
        return {run.variant: run.spec for run in self.runs}

    @cached_property
    def _sizes(self) -> dict[str, RunSize]:
        return {name: estimate_size(spec, self.resources.processes) for name, spec in self._specs.items()}

    @property
    def _output(self) -> Path:
        return launches_folder(self.runs[0].spec).parent

    def _check_output(self) -> Check:
        disk.check_writable(self._output)
        return Check("write", [], str(self._output))

    def _check_data(self) -> Check:
        return Check("data", missing_data(self._specs.values(), Path.cwd()), "readable")

    def _check_models(self) -> Check:
        right = "on this disk" if hub_is_offline() else "local folders whole; HF_HUB_OFFLINE is not set"
        return Check("models", missing_models(self._specs.values()), right)

    def _check_devices(self) -> Check:
        faults: dict[str, None] = {}
        for run in self.runs:
            faults |= dict.fromkeys(device_faults(run.spec, self.resources))
        for run in self.runs:
            faults |= dict.fromkeys(self._process_faults(run))
        asked = self.resources
        finding = f"processes: {asked.processes} (nodes: {asked.nodes}, GPUs of each: {asked.gpus})"
        return Check("gpus", list(faults), finding)

    def _process_faults(self, run: Folder) -> Iterator[str]:
        # A run goes on with as many processes as it began with.
        begun = run.record().get("world_size", self.resources.processes)
        if begun != self.resources.processes:
            yield f"{run.label} was begun by {begun} processes, not {self.resources.processes}"

    def _check_disk(self) -> Check:
        needed = sum(self._sizes[run.variant].disk for run in self.runs)
        free, kind = disk.free_space(self._output)
        finding = f"{size_text(free)} {kind}, checkpoints of {len(self.runs)} runs need {size_text(needed)}"
        return Check("disk", [] if needed <= free else [finding], finding)

    def _check_memory(self) -> Check:
        """Check the largest variant, by the estimate of ``kava plan`` at the longest text."""
        assert self.gpu_memory is not None
        name, size = max(self._sizes.items(), key=lambda item: item[1].memory)
        finding = f"{name} needs about {size_text(size.memory)} of {self.gpu_memory:g} GiB"
        return Check("memory", [] if size.memory <= self.gpu_memory * GIB else [finding], finding)

    def _check_script(self) -> Check:
        run_command("sbatch", "--test-only", text=self.script)
        return Check("sbatch", [], "would take the job")


def device_faults(spec: PipelineSpec, resources: Resources) -> Iterator[str]:
    """Yield what a spec asks of devices that the job would not have."""
    if resources.gpus == 0 and spec.train.precision == "fp16":
        yield "train.precision: fp16 needs a GPU"
    models: dict[str, ModelSpec] = {"student": spec.student}
    for teacher in spec.teachers:
        models[f"teacher {teacher.name}"] = teacher
    for name, model in models.items():
        if resources.gpus == 0 and model.attention == "flash_attention_2":
            yield f"{name}: flash_attention_2 needs a GPU"
    for teacher in spec.teachers:
        device, _, number = teacher.placement.partition(":")
        if device == "cuda" and int(number or 0) >= resources.gpus:
            yield f"teacher {teacher.name}: placement {teacher.placement} needs --gpus {int(number or 0) + 1}"
