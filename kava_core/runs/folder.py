"""Give access to a run on disk: what was asked for, what happened, and whether it is finished.

A run lives in ``<output>/<name>/<variant>-<digest>-s<seed>/``. It is never overwritten: a complete run is
skipped, an incomplete one is resumed. File names of a run are spelled here and nowhere else in kava.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TextIO

from pydantic import ValidationError

from kava_core.errors import CheckpointError, KavaError, SpecError
from kava_core.files import write_json
from kava_core.registry import Registry
from kava_core.runs import checkpoint
from kava_core.runs.record import environment, read_record
from kava_core.specfile.bind import bind_spec_model
from kava_core.specfile.digest import spec_digest
from kava_core.specfile.sections.pipeline import PipelineSpec

RECORD = "run.json"
LAYER_MAPS = "layer_maps"
"""Folder of measured layer maps; in the record, their hashes."""

PLUGIN_CODE = "plugin_code"
"""In the record: the sha256 of every third-party plugin's code, by its distribution."""

KEPT_LAYERS = "kept_layers"
"""In the record: the numbers of the layers that are left of a model, by model; only of cut models."""

LOCK_ATTEMPTS = 4
LOCK_PAUSE = 0.05
"""Seconds between two attempts."""

State = Literal["complete", "running", "stopped", "failed", "interrupted", "missing"]
"""``stopped``: by a signal, saved; ``failed``: with an error; ``interrupted``: killed without a word."""


class Folder:
    """A run on disk: one variant and seed of a spec, and every file that it keeps.

    ``Folder(path)`` is a run that exists: its spec, variant and seed are read from its files.
    ``Folder.planned(spec, variant, seed)`` is where a run belongs, whether or not it has begun.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record_file = path / RECORD
        """What the run is, where it comes from, and how it ended."""
        self.spec_file = path / "spec.json"
        """The resolved spec."""
        self.metrics = path / "metrics.jsonl"
        """A line for everything that was logged."""
        self.samples = path / "samples.jsonl"
        """Some answers that the newest evaluation wrote."""
        self.correct = path / "correct.json"
        """1 or 0 for every validation example: whether the newest evaluation found its answer right."""
        self.student = path / "student"
        """The trained student, sealed."""
        self.checkpoints = path / "checkpoints"
        self.layer_maps = path / LAYER_MAPS
        self.attention_maps = path / "attention.safetensors"
        """What models attend to: head means ``layer time time`` by model."""
        self.attention_tokens = path / "attention.json"
        """The layers and tokens of the attention maps."""
        self.before_training = path / "before_training.safetensors"
        """What the collapse monitor saw before the first step."""
        self.first_weights = path / "first_weights.safetensors"
        """Some of the student's weights before the first step."""
        self.evaluations = path / "evals"
        """What ``kava eval`` wrote of the run."""
        self.latents = path / "latents"
        """What ``kava latents`` wrote of the run."""
        self.log = path / "log.txt"
        """What the run's process printed, if ``kava experiment`` started it."""
        self.failure_file = path / "failure.json"
        self.lock_file = path / "lock"

    @classmethod
    def planned(cls, spec: PipelineSpec, variant: str, seed: int) -> Self:
        """Return the folder where the run of a spec's variant and seed belongs."""
        name = f"{variant}-{spec_digest(spec)}-s{seed}"
        folder = cls(Path(spec.output) / spec.name / name)
        folder.spec, folder.variant, folder.seed = spec, variant, seed
        return folder

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def spec(self) -> PipelineSpec:
        """Return the resolved spec.

        Raises:
            CheckpointError: the file is damaged, or the plugins that the spec names are not installed.
        """
        file = self.spec_file
        try:
            text = file.read_text(encoding="utf-8")
            return bind_spec_model(Registry.build()).model_validate_json(text, strict=True)
        except ValidationError as error:
            raise CheckpointError(f"{file}: {_first_error(error)}") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: unreadable: {error}") from error

    @cached_property
    def variant(self) -> str:
        """Return the name of the spec's variant."""
        return str(self.record()["variant"])

    @cached_property
    def seed(self) -> int:
        """Return the seed."""
        return int(self.record()["seed"])

    @property
    def label(self) -> str:
        """Return variant and seed for people: ``kv seed 3``."""
        return f"{self.variant} seed {self.seed}"

    def checkpoint_at(self, step: int) -> Path:
        """Return the folder of the checkpoint that is saved after ``step`` steps."""
        return checkpoint.path_of_step(self.checkpoints, step)

    def record(self) -> dict[str, Any]:
        """Return the content of ``run.json``, empty if there is none yet.

        Raises:
            CheckpointError: the file is damaged.
        """
        return read_record(self.record_file) if self.record_file.exists() else {}

    def finished_record(self) -> dict[str, Any]:
        """Return the record of a finished run.

        Raises:
            SpecError: the folder holds no run, or one that is not finished.
            CheckpointError: the record is damaged.
        """
        if not self.record_file.is_file():
            raise SpecError(f"{self.path}: not a run directory (no {self.record_file.name})")
        record = self.record()
        if record.get("status") != "complete":
            raise SpecError(f"{self.path}: the run is not finished; train it to its end first")
        return record

    @property
    def complete(self) -> bool:
        """Return whether the run has reached its end."""
        return self.record().get("status") == "complete"

    def state(self) -> State:
        """Return how far the run has come.

        Raises:
            CheckpointError: the record is damaged.
        """
        record = self.record()
        if record.get("status") == "complete":
            return "complete"
        if self.is_locked():
            return "running"
        if self.failure_file.exists():
            return "failed"
        if not record:
            return "missing"
        return "stopped" if record["status"] == "stopped" else "interrupted"

    def failure(self) -> dict[str, Any] | None:
        """Return ``exit_code``, ``error`` and ``when`` of a failure; None if none is noted."""
        try:
            failure: dict[str, Any] = json.loads(self.failure_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return failure

    def is_locked(self) -> bool:
        """Return whether a process on this machine is at work in the folder."""
        try:
            with self.lock_file.open("r+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @contextmanager
    def lock(self, *, wait: bool = False) -> Iterator[None]:
        """Hold the folder for this process.

        Args:
            wait: wait for a process that holds it already, instead of raising an error.

        Raises:
            KavaError: another process holds the folder, or it cannot be written.
        """
        with self._open_lock_file() as stream:
            if wait:
                fcntl.flock(stream, fcntl.LOCK_EX)
            else:
                self._lock_at_once(stream)
            yield

    def _open_lock_file(self) -> TextIO:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return self.lock_file.open("w")
        except OSError as error:
            raise KavaError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _lock_at_once(self, stream: TextIO) -> None:
        # Several attempts: a process that only asks for the state holds the lock for a moment.
        for _ in range(LOCK_ATTEMPTS):
            try:
                return fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(LOCK_PAUSE)
        raise KavaError(f"{self.path}: another process is training here")

    def begin(self, facts: dict[str, Any]) -> None:
        """Write the resolved spec and ``run.json``.

        Args:
            facts: what else the record is to hold, ``data`` among it.

        Raises:
            SpecError: the folder holds another run.
        """
        earlier = self.record()
        facts = facts | environment()
        if earlier:
            self._check_same_run(earlier, facts)
        write_json(self.spec_file, self.spec.model_dump(mode="json"))
        started = earlier.get("started") or _now()
        self.write_record({**facts, "started": started, "status": "running"})

    def _check_same_run(self, earlier: dict[str, Any], facts: dict[str, Any]) -> None:
        """Raise a SpecError where going on would silently be another experiment."""
        if earlier["spec_digest"] != spec_digest(self.spec):
            raise SpecError(
                f"{self.path}: holds a run of spec {earlier['spec_digest']}, not {spec_digest(self.spec)}"
            )
        self.check_data(facts["data"])
        self.check_plugin_code(facts.get(PLUGIN_CODE, {}))
        if earlier.get(LAYER_MAPS, {}) != facts.get(LAYER_MAPS, {}):
            raise SpecError(
                f"{self.path}: a layer map changed since this run began; give the run another name, or bring "
                "the old map back"
            )
        if earlier.get(KEPT_LAYERS, {}) != facts.get(KEPT_LAYERS, {}):
            raise SpecError(
                f"{self.path}: other layers of a model are kept than when this run began; give the run "
                "another name, or give keep_layers the numbers in run.json"
            )
        begun, now = earlier["world_size"], facts["world_size"]
        if begun != now:
            raise SpecError(
                f"{self.path}: begun by {begun} processes, now {now}: the batches would differ; "
                f"start it with {begun}, or give the run another name"
            )

    def check_data(self, data: dict[str, Any]) -> None:
        """Compare the data with those that the run began with.

        Raises:
            SpecError: they are others.
        """
        earlier = self.record()
        if earlier and earlier["data"] != data:
            raise SpecError(f"{self.path}: the data changed since this run began; give the run another name")

    def check_plugin_code(self, code: Mapping[str, str]) -> None:
        """Compare the code of third-party plugins with that which the run began with.

        Args:
            code: sha256 by distribution.

        Raises:
            SpecError: it is another; what a run of an earlier kava began with is not known.
        """
        earlier = self.record().get(PLUGIN_CODE, code)
        changed = sorted(name for name in {*earlier, *code} if earlier.get(name) != code.get(name))
        if changed:
            plugins = f"plugin{'s' if len(changed) > 1 else ''} {', '.join(changed)}"
            raise SpecError(
                f"{self.path}: the code of {plugins} changed since this run began; give the run another "
                "name, or bring the old code back"
            )

    def stop(self) -> None:
        """Record that the run was asked to stop, and can go on."""
        self.write_record({**self.record(), "status": "stopped"})

    def finish(self, results: dict[str, Any], facts: dict[str, Any]) -> None:
        """Record that the run is complete.

        Args:
            results: its last metrics.
            facts: what else is known only now.
        """
        end = {"finished": _now(), "results": results, "status": "complete"}
        self.write_record({**self.record(), **facts, **end})

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace ``run.json`` in one step."""
        identity = {
            "name": self.spec.name,
            "variant": self.variant,
            "seed": self.seed,
            "spec_digest": spec_digest(self.spec),
        }
        write_json(self.record_file, identity | record)

    def fail(self, error: Exception) -> None:
        """Write down the error that ended the run."""
        if isinstance(error, KavaError):
            self.note_failure(error.exit_code, str(error))
        else:
            self.note_failure(1, f"{type(error).__name__}: {error}")

    def note_failure(self, code: int, message: str) -> None:
        """Write ``failure.json``: the exit code and the first line of the message."""
        lines = message.strip().splitlines() or ["no message"]
        write_json(self.failure_file, {"exit_code": code, "error": lines[0], "when": _now()})

    def forget_failure(self) -> None:
        """Delete the note of a failure, because a new attempt begins."""
        self.failure_file.unlink(missing_ok=True)

    def verify_student(self) -> None:
        """Check that the student is what training saved.

        Raises:
            CheckpointError: it is missing or altered.
        """
        if not self.student.is_dir():
            raise CheckpointError(f"{self.student}: missing, though the run is complete")
        checkpoint.verify(self.student)


def runs_in(experiment: Path) -> list[Folder]:
    """Return the runs in a folder such as ``runs/NAME`` that have begun, by name.

    Raises:
        SpecError: one is a link to somewhere outside, as for ``assert_inside``.
    """
    runs = [Folder(file.parent) for file in sorted(experiment.glob(f"*/{RECORD}"))]
    for run in runs:
        assert_inside(run.path, experiment)
    return runs


def assert_inside(path: Path, experiment: Path) -> None:
    """Refuse a run's folder that a link, or a path with ``..``, leads out of the folder of all experiments.

    Args:
        path: of the run.
        experiment: a folder such as ``runs/NAME``; that it is a link itself does not matter.

    Raises:
        SpecError: the run is elsewhere.
    """
    root = experiment.resolve().parent
    if not path.resolve().is_relative_to(root):
        raise SpecError(f"{path}: leads to {path.resolve()}, outside of {root}; move the run there")


def enclosing_run(path: Path) -> Path | None:
    """Return the run's folder that a path is, or is inside of; None if it is in none."""
    resolved = path.resolve()
    return next((place for place in (resolved, *resolved.parents) if (place / RECORD).is_file()), None)


def refuse_inside_run(target: Path) -> None:
    """Refuse to write into a run's folder, whose files belong to the run alone.

    Raises:
        SpecError: the target is a run's folder or inside of one.
    """
    run = enclosing_run(target)
    if run is not None:
        raise SpecError(
            f"{target}: is inside the run {run}, which keeps its own files; give a folder outside"
        )


def _first_error(error: ValidationError) -> str:
    """Return the first thing that is wrong, and where, in one line."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}".removeprefix(": ")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
