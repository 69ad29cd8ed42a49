"""Records that somebody may have damaged, and the numbers in them as text."""

import contextlib
from collections.abc import Iterator

from tli_jax.errors import DataError, TliError


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Whatever a record lacks, or holds of the wrong type, is damage of the record.

    Raises:
        DataError: in place of what reading raised.
    """
    try:
        yield
    except TliError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DataError(
            f"{where}: damaged, or of another version ({type(error).__name__}: {error}): restore or delete it"
        ) from error


def show_number(value: float | None, spec: str = ".4f") -> str:
    """A loss, say; null stands for what was not measured, or is not finite."""
    return "–" if value is None else format(value, spec)
