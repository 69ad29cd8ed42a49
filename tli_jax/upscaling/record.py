"""The record of a growth, ``growth.json``."""

from typing import Any

from tli_jax.growth.plan import Plan
from tli_jax.hf import hub, sidecar
from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.hf.grown_config import grown_config


def describe_growth(base: Checkpoint, plan: Plan, model: str) -> dict[str, Any]:
    """The keys of ``growth.json`` that are known before any weights are read.

    Args:
        model: name of the base, if it does not come from the Hub.
    """
    name, revision = hub.origin(base.folder) or (model, None)
    history = [dict(growth) for growth in plan.history]
    if base.growth is not None:  # how the base of the base had been trained
        history[-1]["base"] = history[-1]["base"] | {"training": base.growth["base"].get("training", [])}
    return {
        **plan.to_json(),
        "base": {"layers": plan.base_layers, "name": name, "revision": revision, "training": base.trainings},
        "history": history,
        "parameters": grown_config(base.config, plan).num_params,
        "versions": sidecar.versions("tli_jax", "numpy", "jax"),
    }


def unconverged(facts: dict[str, Any]) -> list[str]:
    """Warnings about what initialisers that run on the host found."""
    return [f"{tensor}: transport did not converge" for tensor in facts.get("transport", {}).get("not_converged", [])]
