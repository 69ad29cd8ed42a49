"""The record that a trained model carries: ``training.json``."""

from pathlib import Path
from typing import Any

from tli_jax.cli.config import TrainConfig
from tli_jax.hf import hub
from tli_jax.hf.card import is_on_hub, read_base_card
from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.hf.records import read_trainings
from tli_jax.training.metrics import losses, read_metrics
from tli_jax.training.run_directory import RunDirectory


def describe_base(weights: Checkpoint) -> dict[str, Any]:
    """What ``run.json`` says of the model that a run starts from.

    Returns:
        ``base``, the hub id and commit that the model goes back to, or else the name of its folder, with the revision
        null, and what ``read_base_card`` finds, if anything; ``earlier``, what ``read_trainings`` finds.
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
    if card := read_base_card(weights.folder):
        base = base | {"card": card}
    return {"base": base, "earlier": earlier}


def describe_training(run: RunDirectory, config: TrainConfig, outer: list[str], T: int, step: int) -> dict[str, Any]:
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
