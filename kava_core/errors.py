"""Define every error kava raises on purpose, with its exit code, and help to word them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
