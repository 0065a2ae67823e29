"""Run the command line: ``kava VERB spec.yaml key=value …``. Commands are thin, heavy imports inside them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from kava_core.cli import installed, prepare, results, runs
from kava_core.errors import KavaError, PluginError, SpecError
from kava_core.processes import leave, let_waiting_threads_sleep, world_size

app = typer.Typer(
    name="kava",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TRACEBACK = "KAVA_TRACEBACK"
"""Environment variable: show where an error was raised."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: an error kava can explain goes to stderr without a traceback."""
    let_waiting_threads_sleep()
    try:
        _refuse_nul(sys.argv[1:] if arguments is None else arguments)
        app(args=arguments)
    except Exception as error:
        explained = explain_error(error)
        wants_traceback = os.environ.get(TRACEBACK, "") not in ("", "0")
        if explained is None or wants_traceback:
            raise
        print(explained, file=sys.stderr)
        _exit_with_code(explained.exit_code)


def _refuse_nul(arguments: Sequence[str]) -> None:
    """Raise a SpecError at an argument with a NUL, which the system takes in no path."""
    for argument in arguments:
        if "\0" in argument:
            raise SpecError(f"argument {argument!r}: a NUL character is not allowed")


def _exit_with_code(code: int) -> NoReturn:
    """Exit; one of several processes exits in a way that torch.distributed survives."""
    if world_size() > 1:
        leave(code)
    sys.exit(code)


def explain_error(error: Exception) -> KavaError | None:
    """Return an error as one that kava can explain, None if it cannot.

    It can explain its own errors, and any that was raised inside a component, which a note names.
    """
    notes = getattr(error, "__notes__", ())
    components = [note.removeprefix("in ") for note in notes if note.startswith("in ")]
    if isinstance(error, KavaError):
        return type(error)(": ".join([*components, str(error)])) if components else error
    if not components:
        return None
    lines = str(error).strip().splitlines() or ["no message"]
    # Of an error of jaxtyping, these lines matter most.
    facts = [line for line in lines if line.startswith(("Actual value", "Expected type"))]
    message = " ".join([lines[0], *facts])
    return PluginError(f"{components[0]}: {type(error).__name__}: {message} (--traceback shows where)")


@app.callback()
def options(
    check_shapes: Annotated[
        bool, typer.Option("--check-shapes", help="Check every tensor's shape and type at run time (slow).")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    """Distil the key-value caches of teachers into a student, as a spec file says."""
    if traceback:
        os.environ[TRACEBACK] = "1"
    if check_shapes:
        from kava_core import shapecheck

        os.environ[shapecheck.VARIABLE] = "1"
        shapecheck.enable()


VERBS = (
    *(prepare.check, runs.train, runs.experiment, results.report, runs.launch, runs.status),
    *(prepare.cache, prepare.sample, prepare.plan, prepare.calibrate, prepare.profile),
    *(results.export, results.evaluate, results.latents),
    *(installed.plugins, installed.schema, installed.env),
)
"""In the order in which ``kava --help`` lists them."""

for verb in VERBS:
    app.command("eval" if verb is results.evaluate else None)(verb)

new = typer.Typer(no_args_is_help=True, help="Write a new plugin package or spec.")
new.command("plugin")(installed.new_plugin)
new.command("spec")(installed.new_spec)
app.add_typer(new, name="new")
