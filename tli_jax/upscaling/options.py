"""From the options of a growth to its plan."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from tli_jax.cli.config import UpscaleConfig
from tli_jax.errors import UsageError
from tli_jax.growth.experts import Experts
from tli_jax.growth.methods import METHODS
from tli_jax.growth.plan import Plan
from tli_jax.hf.checkpoint import Checkpoint


def make_plan(config: UpscaleConfig, base: Checkpoint, importance: Sequence[float] | None = None) -> Plan:
    """The plan that the options ask for, continuing the base's own growth where it has one.

    Args:
        importance: of the layers, for ``adept`` (see ``needs_importance``).

    Raises:
        UsageError: an option does not belong to the method, or is out of range.
    """
    preset = METHODS[config.method]
    known = inspect.signature(preset).parameters
    names = ("every", "init", "scale", "after", "remainder", "drop", "groups", "copies", "times", "layers")
    names += ("seed", "noise_ratio", "block", "count")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    experts = _make_experts(config, base)
    if experts is not None:
        # What is drawn is drawn for the experts, unless the method draws too.
        given = {name: value for name, value in given.items() if name in known or name not in ("seed", "noise_ratio")}
    if config.method == "custom":
        if "layers" not in given:
            raise UsageError("custom needs --layers, e.g. --layers '0-3, 3*0, 4-7'")
        given["spec"] = given.pop("layers")
    foreign = sorted(name for name in given if name not in known or name == "layers")
    if foreign:
        own = ", ".join(name for name in known if name in names and name != "layers") or "none"
        raise UsageError(f"{', '.join(foreign)}: not an option of method {config.method}, which has {own}")
    if "std" in known:
        given["std"] = base.config.initializer_range
    if needs_importance(config):
        given["importance"] = importance
    plan = dataclasses.replace(preset(base.config.num_hidden_layers, **given), experts=experts)
    return (
        plan if base.growth is None else plan.continues(Plan.from_json(base.growth, str(base.folder / "growth.json")))
    )


def _make_experts(config: UpscaleConfig, base: Checkpoint) -> Experts | None:
    """What the options make of the feed-forwards; None where they say nothing of experts."""
    keys: dict[str, Any] = {"count": config.experts, "top_k": config.top_k, "granularity": config.granularity}
    keys |= {"upcycle": config.upcycle, "router_std": config.router_std}
    given: dict[str, Any] = {name: value for name, value in keys.items() if value is not None}
    if not given and config.method != "moe":
        return None
    if config.seed is not None:
        given["seed"] = config.seed
    if config.noise_ratio is not None and (config.method == "moe" or given.get("upcycle") in ("noise", "drop")):
        given["ratio"] = config.noise_ratio
    defaults: dict[str, Any] = {"router_std": base.config.initializer_range}
    return Experts(**defaults | given)


def needs_importance(config: UpscaleConfig) -> bool:
    """Whether the plan depends on the weights."""
    return config.method == "adept" and config.after is None
