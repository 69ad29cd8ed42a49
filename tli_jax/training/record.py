"""The record that a trained model carries: ``training.json``."""

from pathlib import Path
from typing import Annotated, Any

import pydantic

from tli_jax.checkpoint import hub
from tli_jax.checkpoint.headers import read_json
from tli_jax.checkpoint.hf import Checkpoint
from tli_jax.config import TrainConfig
from tli_jax.errors import DataError
from tli_jax.report.card import is_on_hub
from tli_jax.report.run import losses
from tli_jax.training.metrics import read_metrics
from tli_jax.training.run import RunFolder

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


def describe_base(weights: Checkpoint) -> dict[str, Any]:
    """What ``run.json`` says of the model that a run starts from.

    Returns:
        ``base``, the hub id and commit that the model goes back to, or else the name of its folder, with the revision
        null; ``earlier``, what ``read_trainings`` finds.
    """
    earlier, growth = read_trainings(weights.folder), (weights.growth or {}).get("base", {})
    if (found := hub.origin(weights.folder)) is not None:
        base = {"name": found[0], "revision": found[1]}
    elif earlier:
        base = earlier[-1]["base"]
    elif growth.get("name"):
        base = {"name": growth["name"] if is_on_hub(growth) else Path(growth["name"]).name}
        base |= {"revision": growth.get("revision")}
    else:
        base = {"name": weights.folder.name, "revision": None}
    return {"base": base, "earlier": earlier}


def describe_training(run: RunFolder, config: TrainConfig, outer: list[str], T: int, step: int) -> dict[str, Any]:
    """What ``training.json`` says of a run, up to one of its steps. It names no path.

    Args:
        outer: the tensors outside the layers that train.
        T: tokens a sequence.

    Returns:
        ``run``, its id; ``step`` and ``tokens``; ``losses``, see ``report.run.losses``; ``only`` and ``outer``, what
        trained; ``optimizer`` and peak ``learning_rate`` by group; ``text``, the digest of the data; ``base``, what it
        started from; ``earlier``, the records of the trainings before, since the model was last grown; ``versions``.
    """
    facts = run.check_facts({})
    return {
        "run": facts["id"],
        "step": step,
        "tokens": step * config.batch_size * T,
        "losses": losses([line for line in read_metrics(run) if line["step"] <= step]),
        "only": config.only,
        "outer": outer,
        "optimizer": config.optimizer,
        "learning_rate": config.learning_rate,
        "text": facts["data"],
        "base": facts["base"],
        "earlier": facts["earlier"],
        "versions": facts["versions"],
    }


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
