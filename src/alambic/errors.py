"""Every error alambic raises on purpose.

AlambicError
 ├── TaskError          the task file is wrong
 ├── DataError          a data file or a row of it is wrong
 ├── BaseModelError     a base model is missing, damaged or unsupported
 ├── TemplateError      a chat template does not parse, or refuses a conversation
 ├── TrainError         training cannot go on (labels, divergence)
 │    └── ProcessLost   another process of the same training has ended
 ├── PackError          a model cannot be packed, or its round-trip proof failed
 ├── BundleError        a bundle is missing, damaged, tampered with or too new
 ├── EngineError        an engine cannot run a bundle or an input
 │    └── InputTooLong  the text is longer than the model reads and the task says `long = "error"`
 ├── WorkspaceError     the run folder cannot be used (permissions, lock, disk)
 ├── MissingExtra       an optional dependency is not installed

A message says what, where, the value got and the values allowed; `hint` is the next thing to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlambicError(Exception):
    """Base of all errors a user can act on; `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class TaskError(AlambicError):
    """The task file is missing, unreadable or invalid."""

    exit_code = 2


class DataError(AlambicError):
    """A data file, or a row of it, cannot be used; the message begins with `file:line`."""


class BaseModelError(AlambicError):
    """A base model is missing, damaged, unsafe or not supported."""


class TemplateError(AlambicError):
    """A chat template does not parse, or refuses or garbles a conversation."""


class TrainError(AlambicError):
    """Training cannot start or go on."""


class ProcessLost(TrainError):
    """Another process of the same training has ended before its time."""


class PackError(AlambicError):
    """A model cannot be packed, or the packed form does not agree with the model."""


class BundleError(AlambicError):
    """A bundle is missing, damaged, tampered with, or made by a newer version."""


class EngineError(AlambicError):
    """An engine cannot run this bundle or this input."""


class InputTooLong(EngineError):
    """A text is longer than the model reads and the task says `long = "error"`."""


class WorkspaceError(AlambicError):
    """The run folder cannot be written, is locked by another build, or the disk is full."""


class MissingExtra(AlambicError):
    """An optional dependency is needed and not installed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? Known: a, b, c"`` for an unknown `name`."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listing = "known: " + ", ".join(names) if names else "none are known"
    return f"did you mean {close[0]!r}? {listing}" if close else listing
