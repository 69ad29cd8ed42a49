"""``training.json``, the record that a trained model carries."""

from pathlib import Path
from typing import Annotated, Any

import pydantic

from tli_jax.errors import DataError
from tli_jax.hf.headers import read_json

RECORD = "training.json"
_Loss = Annotated[float, pydantic.Field(allow_inf_nan=False)] | None
_Count = Annotated[int, pydantic.Field(ge=0, lt=2**63)]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)


class _Base(_Model):
    name: str
    revision: str | None


class _Losses(_Model):
    validation_before: _Loss
    validation_after: _Loss
    training: _Loss


class _Training(_Model):
    """What ``describe_training`` gives."""

    run: str
    step: _Count
    tokens: _Count
    losses: _Losses
    only: str
    outer: list[str]
    optimizer: str
    learning_rate: dict[str, float]
    text: str
    base: _Base
    versions: dict[str, str]


class _Record(_Training):
    earlier: list[_Training]


def read_training(file: Path) -> dict[str, Any]:
    """A record as ``describe_training`` gives it.

    Raises:
        DataError: it is damaged; names the keys.
    """
    record = read_json(file)
    try:
        _Record.model_validate(record)
    except pydantic.ValidationError as error:
        keys = dict.fromkeys(".".join(map(str, one["loc"])) for one in error.errors())
        raise DataError(f"{file}: {', '.join(keys)} missing or wrong: restore or delete the file") from None
    return record


def read_trainings(folder: Path) -> list[dict[str, Any]]:
    """The records of all trainings of a model since it was last grown, oldest first.

    Raises:
        DataError: ``training.json`` is damaged.
    """
    if not (folder / RECORD).is_file():
        return []
    last = read_training(folder / RECORD)
    return [*last.pop("earlier"), last]
