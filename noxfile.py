"""The test matrix. ``nox`` runs what CI runs; ``nox -l`` lists the rest.

A Python that is not installed is skipped and named at the end; CI asks for all three (``.ci/run``).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = "KAVA_ALL_PYTHONS" in os.environ
nox.options.reuse_venv = "yes"
nox.options.sessions = ["everything", "declarative-3.12", "declarative-3.13"]

CONSTRAINTS = ("-c", "constraints.txt")
PYTHONS = ("3.11", "3.12", "3.13")
TORCH_FREE = (
    "pydantic",
    "pluggy",
    "pyyaml",
    "typer",
    "rich",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "packaging",
)
TORCH_FREE_TESTS = (
    *("tests/specfile", "tests/root/test_registry.py", "tests/cli/test_explained.py"),
    *("tests/data/test_chain.py", "tests/data/test_splits.py", "tests/meta/test_imports.py"),
)
SHAPED_TESTS = (
    "tests/kv/align",
    "tests/kv/compare",
    "tests/plugins/test_conformance.py",
    "tests/protocols",
)
"""Where tensors pass from one component to another."""

TRAINS = "test_changes.py"
"""A file of tests/data whose tests train, with components of ``kava_plugins``."""
CORE_TESTS = (
    *("tests/kv/capture", "tests/kv/align/test_stage_order.py", "tests/kv/maths/test_resample.py"),
    "tests/protocols",
    *(str(file) for file in sorted(Path("tests/data").glob("test_*.py")) if file.name != TRAINS),
)


def install(session: nox.Session, *what: str) -> None:
    """torch first and pinned: unpinned it brings gigabytes of CUDA.

    pip compiles no byte code: it would take longer than all the rest, and Python compiles what it imports.
    """
    session.install("--no-compile", *CONSTRAINTS, "torch")
    session.install("--no-compile", *CONSTRAINTS, *what)


def run_tests(session: nox.Session, *which: str, shapes: bool) -> None:
    """Run tests, all of them by default, but those of a release."""
    # Compiled imports are kept, or every process that a test starts would compile torch again.
    environment = {"KAVA_SHAPE_CHECK": "1" if shapes else "0", "PYTHONDONTWRITEBYTECODE": ""}
    session.run("pytest", "-n", "2", *which, *session.posargs, env=environment)


def run_ruff(session: nox.Session) -> None:
    """Check the style and the format of every file."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python="3.11")
def everything(session: nox.Session) -> None:
    """ruff, mypy and every test once, in one environment: torch is installed once.

    The border between components is tested with shape checking, all others without: in debug mode a run takes
    twice as long.
    """
    install(session, "-e", ".[dev]")
    run_ruff(session)
    session.run("mypy")
    run_tests(session, *SHAPED_TESTS, shapes=True)
    run_tests(session, *(f"--ignore={tests}" for tests in SHAPED_TESTS), shapes=False)


@nox.session(python=PYTHONS)
@nox.parametrize("shapes", [True, False])
def tests(session: nox.Session, shapes: bool) -> None:
    """The whole suite; with and without run-time shape checking."""
    install(session, "-e", ".[dev]")
    run_tests(session, shapes=shapes)


@nox.session(python=PYTHONS)
def declarative(session: nox.Session) -> None:
    """Specs, registry and imports without torch installed."""
    session.install("--no-compile", *CONSTRAINTS, *TORCH_FREE)
    session.install("--no-deps", "-e", ".")
    run_tests(session, *TORCH_FREE_TESTS, shapes=False)


@nox.session(python="3.11")
def harness(session: nox.Session) -> None:
    """An exported student, judged by the real lm-evaluation-harness: the same score as ``kava eval``."""
    install(session, "-e", ".[dev,eval]")
    session.run("pytest", "tests/jobs/test_evaluate.py", "-k", "harness", env={"HF_HUB_OFFLINE": "1"})


@nox.session(python="3.11")
def minimums(session: nox.Session) -> None:
    """The suite against the oldest versions pyproject allows (torch as pinned: older wheels need CUDA)."""
    install(session, "-e", ".[dev]")
    session.install(
        "pydantic==2.10.*",
        "pluggy==1.5.*",
        "einops==0.8.0",
        "jaxtyping==0.3.2",
        "beartype==0.20.*",
        "typer==0.15.*",
    )
    session.run("pytest", *session.posargs)


@nox.session(python="3.11")
def core_alone(session: nox.Session) -> None:
    """The core with ``kava_plugins`` absent: from a copy without it, and kava itself not installed."""
    copy = Path(session.create_tmp()) / "core"
    shutil.rmtree(copy, ignore_errors=True)
    for folder in ("kava_core", "tests"):
        shutil.copytree(folder, copy / folder)
    shutil.copy("pyproject.toml", copy)
    project = nox.project.load_toml("pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    tools = [line for line in extras["dev"] if not line.startswith("kava")]
    install(session, *project["dependencies"], *tools, *extras["lora"], *extras["hub"])
    with session.chdir(copy):
        session.run("python", "-m", "pytest", *CORE_TESTS, *session.posargs, env={"KAVA_SHAPE_CHECK": "0"})


@nox.session(python="3.11")
def plugin_example(session: nox.Session) -> None:
    """Build kava's wheel, install it with the conformance kit, and the example plugin; run its tests."""
    wheels = Path(session.create_tmp()).resolve()
    session.install("build")
    session.run("python", "-m", "build", "--wheel", "--outdir", str(wheels), ".")
    session.install(*CONSTRAINTS, "torch")
    session.install(*CONSTRAINTS, f"{next(wheels.glob('kava-*.whl'))}[testing]")
    session.install("examples/kava-last-layers")
    with session.chdir("examples/kava-last-layers"):
        session.run("pytest", env={"KAVA_SHAPE_CHECK": "1"})


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """ruff."""
    session.install(*CONSTRAINTS, "ruff")
    run_ruff(session)


@nox.session(python="3.11")
def types(session: nox.Session) -> None:
    """mypy, strict on the declarative half."""
    install(session, "-e", ".[dev]")
    session.run("mypy")


@nox.session(python="3.11")
def quickstart(session: nox.Session) -> None:
    """The embedded default, from nothing."""
    install(session, "-e", ".[all]")
    session.run("kava", "train", "specs/quickstart.yaml", f"output={session.create_tmp()}")


@nox.session(python="3.11")
def bench(session: nox.Session) -> None:
    """The whole step: over its floor, against a hand-written one and against peers; prints the tables."""
    install(session, "-e", ".[all]")
    session.install(
        "--no-deps", *nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), "peers")
    )
    for script in ("step", "handwritten", "latent", "peers"):
        session.run("python", f"benchmarks/{script}.py", *session.posargs)


@nox.session(python="3.11")
def gpu(session: nox.Session) -> None:
    """Tests that need a CUDA device."""
    install(session, "-e", ".[dev]")
    session.run("pytest", "-m", "gpu", "tests/gpu", *session.posargs)
