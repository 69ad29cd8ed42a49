"""``training.json``: the record that a trained model carries."""

from pathlib import Path
from typing import Any

from tli_jax.cli.train_config import TrainConfig
from tli_jax.hf import hub
from tli_jax.hf.card import is_on_hub, read_base_card
from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.training.metrics import losses, read_metrics
from tli_jax.training.run_directory import RunDirectory


def describe_base(weights: Checkpoint) -> dict[str, Any]:
    """Return the keys of ``run.json`` about the model that a run starts from.

    ``base`` is the Hub id and commit of the original model, or else its folder name with revision null, and in
    ``card`` its licence and language if a card tells them. ``earlier`` is ``Checkpoint.trainings``.
    """
    earlier, growth = weights.trainings, (weights.growth or {}).get("base", {})
    if (origin := hub.origin(weights.folder)) is not None:
        base = {"name": origin[0], "revision": origin[1]}
    elif earlier:
        base = earlier[-1]["base"]
    elif growth.get("name"):
        base = {"name": growth["name"] if is_on_hub(growth) else Path(growth["name"]).name}
        base |= {"revision": growth.get("revision")}
    else:
        base = {"name": weights.folder.name, "revision": None}
    if card := read_base_card(weights.folder):
        base = {**base, "card": card}
    return {"base": base, "earlier": earlier}


def describe_training(run: RunDirectory, config: TrainConfig, outer: list[str], T: int, step: int) -> dict[str, Any]:
    """Return ``training.json`` for a run up to one of its steps. It contains no paths.

    Args:
        outer: the trainable tensors outside the layers.
        T: tokens per sequence.

    Returns:
        ``run``, its id; ``step`` and ``tokens``; ``losses``, see ``metrics.losses``; ``only`` and ``outer``, the
        trainable parameters; ``optimizer`` and peak ``learning_rate`` by group; ``text``, the digest of the data;
        ``base``; ``earlier``, the trainings since the model was last grown; ``versions``.
    """
    facts = run.read_facts()
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
