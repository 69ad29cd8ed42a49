"""Read ``growth.json`` and ``training.json``. Anyone may have written them, so the type of every value is checked.

Damage raises ``DataError``, which names the keys.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic

from tli_jax.errors import DataError, TliError
from tli_jax.growth.plan import Plan
from tli_jax.hf.inputs import read_json

GROWTH, TRAINING = "growth.json", "training.json"
_Number = Annotated[float, pydantic.Field(gt=-1e300, lt=1e300)]
_Measured = _Number | None  # null stands for NaN and infinity
_Count = Annotated[int, pydantic.Field(ge=0, lt=2**63)]


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)


class _Change(_Record):
    layer: _Count
    relative_change: _Measured
    cosine: _Measured


class _Proof(_Record):
    tokens: _Count
    text: str
    dtype: str
    device: str
    max_abs_logit: _Measured
    max_abs_logit_difference: _Measured
    kl: _Measured
    loss_base: _Measured
    loss_grown: _Measured
    top1: _Measured
    parted_at: _Count | None
    changes: list[_Change]
    seconds: _Number


class _GrownFrom(_Record):
    name: str | None = None
    revision: str | None = None


class _Digests(_Record):
    base: dict[str, str] | None
    grown: dict[str, str] | None


class _Growth(_Record):
    """The keys of ``growth.json`` that ``Plan.from_json`` does not check."""

    base: _GrownFrom
    proof: _Proof | None = None
    proof_before_training: _Proof | None = None
    guarantee: str = ""
    parameters: _Count = 0
    digests: _Digests | None = None
    nonfinite: dict[str, _Count] = {}
    computed: dict[str, Any] = {}
    versions: dict[str, str] = {}
    training: dict[str, Any] | None = None


class _TrainedFrom(_Record):
    name: str
    revision: str | None
    card: dict[str, Any] = {}


class _Losses(_Record):
    validation_before: _Measured
    validation_after: _Measured
    training: _Measured


class _Training(_Record):
    """The result of ``training.record.describe_training``, without its ``earlier``."""

    run: str
    step: _Count
    tokens: _Count
    losses: _Losses
    only: str
    outer: list[str]
    trainable_parameters: _Count = 0
    optimizer: str
    learning_rate: dict[str, float]
    text: str
    base: _TrainedFrom
    versions: dict[str, str]


class _Trainings(_Training):
    earlier: list[_Training]


def _check(model: type[_Record], record: dict[str, Any], file: Path) -> None:
    try:
        model.model_validate(record)
    except pydantic.ValidationError as error:
        keys = list(dict.fromkeys(".".join(map(str, fault["loc"])) for fault in error.errors()))
        names = ", ".join(keys[:5]) + ", …" * (len(keys) > 5)
        raise DataError(f"{file}: keys missing or invalid: {names[:300]}: restore or delete the file") from None


def read_growth(file: Path) -> dict[str, Any]:
    """Read ``growth.json``. ``proof`` is always present, and null if no proof was run."""
    record = read_json(file)
    Plan.from_json(record, str(file))
    _check(_Growth, record, file)
    return {"proof": None} | record


def read_training(file: Path) -> dict[str, Any]:
    """Read ``training.json``."""
    record = read_json(file)
    _check(_Trainings, record, file)
    return record


def read_trainings(folder: Path) -> list[dict[str, Any]]:
    """The records of all training runs of a model since its last growth, oldest first."""
    if not (folder / TRAINING).is_file():
        return []
    last = read_training(folder / TRAINING)
    return [*last.pop("earlier"), last]


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn the exceptions of code that reads a damaged record into a ``DataError``."""
    try:
        yield
    except TliError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DataError(
            f"{where}: damaged, or of another version ({type(error).__name__}: {error}): restore or delete it"
        ) from error
