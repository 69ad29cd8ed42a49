"""The errors a user can cause. Each knows the exit code that its command leaves with.

A message is one line: what is wrong, where (file, tensor or key), and what to do about it.
"""

import difflib
from collections.abc import Iterable


class TliError(ValueError):
    """Base of every error that a user, not a programmer, has to act on."""

    exit_code = 70


class UsageError(TliError):
    """A wrong option, configuration key or value."""

    exit_code = 2


class DataError(TliError):
    """Input that is there but damaged, contradictory or not supported."""

    exit_code = 65


class MissingInputError(TliError):
    """Input that is not there."""

    exit_code = 66


class UnavailableError(TliError):
    """A service or a peer that does not answer."""

    exit_code = 69


class OutputError(TliError):
    """An output that cannot be created where it was asked for."""

    exit_code = 73


class StorageError(TliError):
    """The system refused to read or write: disk full, permission, input/output error."""

    exit_code = 74


class StoppedError(TliError):
    """Told to stop; everything is saved, and the same command goes on."""

    exit_code = 75


class DivergedError(TliError):
    """Training that leads nowhere: the loss is not finite, or gradients keep exploding."""

    exit_code = 76


class ProofError(DataError):
    """The grown model does not keep what its plan promises."""


def nearest(word: str, words: Iterable[str]) -> str:
    """For the end of a message: which known word a mistyped one may have meant, or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f", is {close[0]} meant?" if close else ""
