"""Define every error kava raises on purpose, with its exit code, and help to word them."""

from __future__ import annotations

import difflib
import dis
import traceback
from collections.abc import Iterable
from pathlib import PurePath
from types import FrameType


class KavaError(Exception):
    """A failure kava can explain in one line. The command line prints it without a traceback."""

    exit_code = 1


class SpecError(KavaError):
    """The spec file or the command line asks for something that does not exist or does not fit."""

    exit_code = 2


class PluginError(KavaError):
    """An installed plugin is broken, or a component breaks its contract."""

    exit_code = 3


class NonFiniteError(KavaError):
    """A loss or gradient is NaN or infinite; raised before the weights are touched."""

    exit_code = 4


class CheckpointError(KavaError):
    """A checkpoint is missing, incomplete, altered, or belongs to another run."""

    exit_code = 5


class Preempted(KavaError):
    """The run was asked to stop, saved its state, and can be started again to go on."""

    exit_code = 75


class UnsupportedModelError(KavaError):
    """A model's attention cannot be captured without being silently wrong."""

    exit_code = 2


def did_you_mean(given: str, possible: Iterable[str]) -> str:
    """Return ``"; did you mean 'ratio'?"``, or the empty string if nothing is close."""
    close = difflib.get_close_matches(given, list(possible), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_of(possible: Iterable[str]) -> str:
    """Return the possible values, sorted and comma-separated, for an error message."""
    return ", ".join(sorted(possible)) or "none"


def is_request_to_stop(error: BaseException) -> bool:
    """Return whether an exception stops Python from outside: Ctrl-C, or a generator that is closed.

    Python raises those two between any two instructions. One that a ``raise`` statement raises, in a plugin
    for example, is a fault like any other.
    """
    return isinstance(error, KeyboardInterrupt | GeneratorExit) and not _comes_from_raise(error)


def _comes_from_raise(error: BaseException) -> bool:
    place = error.__traceback__
    if place is None:
        return False
    while place.tb_next is not None:
        place = place.tb_next
    instructions = dis.get_instructions(place.tb_frame.f_code)
    return any(step.offset == place.tb_lasti and step.opname == "RAISE_VARARGS" for step in instructions)


def failing_frame(error: BaseException, package: str = "") -> str:
    """Return where an error was raised, as ``file.py:12``; empty if that is unknown.

    Args:
        error: what was raised.
        package: the innermost frame of this package is preferred: a plugin's own line says more than that of
            a library it calls.
    """
    frames = [(frame.f_globals.get("__name__", ""), frame, line) for frame, line in _frames_of(error)]
    own = [entry for entry in frames if package and entry[0].partition(".")[0] == package]
    if not frames:
        return ""
    _, frame, line = (own or frames)[-1]
    return f"{PurePath(frame.f_code.co_filename).name}:{line}"


def _frames_of(error: BaseException) -> list[tuple[FrameType, int]]:
    return list(traceback.walk_tb(error.__traceback__))


def one_line(error: BaseException) -> str:
    """Return type and message of an error that is not kava's own, without line breaks."""
    message = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {message}"
