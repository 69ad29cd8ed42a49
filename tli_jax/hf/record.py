"""``growth.json``, read as what anybody may have written: whatever follows can rely on the types of what it finds."""

import contextlib
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tli_jax.errors import DataError, TliError
from tli_jax.growth.plan import Plan
from tli_jax.hf.headers import read_json

Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _mapping(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _object(**checks: Check) -> Check:
    """An object that has at least these keys."""
    return lambda value: isinstance(value, dict) and all(key in value and ok(value[key]) for key, ok in checks.items())


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


# null where the weights were not finite.
_MEASURED = _or_null(_is_number)
_MEASUREMENTS = ("max_abs_logit", "max_abs_logit_difference", "kl", "loss_base", "loss_grown", "top1")
_CHANGE = _object(layer=_is_count, relative_change=_MEASURED, cosine=_MEASURED)
_PROOF = _object(
    **dict.fromkeys(_MEASUREMENTS, _MEASURED),
    tokens=_is_count,
    text=_is_text,
    dtype=_is_text,
    device=_is_text,
    parted_at=_or_null(_is_count),
    changes=_list_of(_CHANGE),
    seconds=_is_number,
)
# Keys beside those of the plan; each may be missing.
_KEYS: dict[str, Check] = {
    "proof": _or_null(_PROOF),
    "proof_before_training": _or_null(_PROOF),
    "guarantee": _is_text,
    "parameters": _is_count,
    "digests": _or_null(_object(grown=_or_null(_mapping(_is_text)), base=_or_null(_mapping(_is_text)))),
    "nonfinite": _mapping(_is_count),
    "computed": lambda value: isinstance(value, dict),
    "versions": _mapping(_is_text),
    "training": _or_null(lambda value: isinstance(value, dict)),
}


def read_growth_record(file: Path) -> dict[str, Any]:
    """The record of a growth, every key of which is what this package writes there, or absent.

    ``proof`` is always there, and null where none was run; what it measured is null where it was not finite.

    Raises:
        DataError: it is damaged, no plan of this version, or a key is not of its type.
    """
    record = read_json(file)
    Plan.from_json(record, str(file))
    base = record["base"]
    for key in ("name", "revision"):
        if not _or_null(_is_text)(base.get(key)):
            raise DataError(f"{file}: base.{key} is {reprlib.repr(base[key])}, must be a string: fix or delete it")
    for key, check in _KEYS.items():
        if key in record and not check(record[key]):
            raise DataError(f"{file}: {key} is {reprlib.repr(record[key])}, not what a growth writes: fix or delete it")
    return {"proof": None} | record


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
