"""Errors that a user can cause. Each has the exit code of the command that it ends.

A message is one line: where the problem is (file, tensor or key), what it is, and what to do about it.
"""

import difflib
from collections.abc import Iterable


class TliError(ValueError):
    """Base class of all errors that a user, not a programmer, has to act on."""

    exit_code = 70


class UsageError(TliError):
    """An invalid option, configuration key or value."""

    exit_code = 2


class DataError(TliError):
    """Input that exists but is damaged, contradictory or unsupported."""

    exit_code = 65


class MissingInputError(TliError):
    """Input that does not exist."""

    exit_code = 66


class UnavailableError(TliError):
    """A service or another process that does not answer."""

    exit_code = 69


class OutputError(TliError):
    """An output that cannot be created at the requested path."""

    exit_code = 73


class StorageError(TliError):
    """The system refused to read or write: disk full, no permission, input/output error."""

    exit_code = 74


class StoppedError(TliError):
    """The process was asked to stop. Everything is saved; the same command resumes."""

    exit_code = 75


class DivergedError(TliError):
    """Training diverged: the loss is not finite, or the gradient keeps exploding."""

    exit_code = 76


class ProofError(DataError):
    """The grown model does not keep the guarantee of its plan."""


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of a message: the known word that a mistyped one resembles, or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {close[0]}?" if close else ""
