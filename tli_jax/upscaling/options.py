"""Make a plan from the options of growth."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from tli_jax.cli.growth_options import GrowthOptions
from tli_jax.errors import UsageError
from tli_jax.growth.experts import Experts
from tli_jax.growth.methods import METHODS
from tli_jax.growth.plan import Plan
from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.upscaling.positions import choose_positions, read_plan

_OPTIONS = ("every", "init", "scale", "after", "remainder", "drop", "groups", "copies", "times", "layers")
_OPTIONS += ("seed", "noise_ratio", "block", "count")


def make_plan(config: GrowthOptions, base: Checkpoint, importance: Sequence[float] | None = None) -> Plan:
    """The plan for a base model. If the base was grown before, the plan continues its history.

    Args:
        importance: of each layer, for method ``adept``; see ``needs_importance``.

    Raises:
        UsageError: an option does not apply to the method, or is out of range.
    """
    method = METHODS[config.method]
    parameters = inspect.signature(method).parameters
    given = {name: getattr(config, name) for name in _OPTIONS if getattr(config, name) is not None}
    layers, experts = base.config.num_hidden_layers, _make_experts(config, base)
    if config.plan is not None:
        if given:
            raise UsageError(f"plan {config.plan} sets every layer, remove {', '.join(given)}")
        return _continue(base, dataclasses.replace(read_plan(config.plan, layers), experts=experts))
    if experts is not None:
        # Seed and noise belong to the experts, unless the method has random weights too.
        given = {k: value for k, value in given.items() if k in parameters or k not in ("seed", "noise_ratio")}
    if config.method == "custom":
        if "layers" not in given:
            raise UsageError("custom needs --layers, e.g. --layers '0-3, 3*0, 4-7'")
        given["spec"] = given.pop("layers")
    unknown = sorted(name for name in given if name not in parameters or name == "layers")
    if unknown:
        allowed = ", ".join(name for name in parameters if name in _OPTIONS and name != "layers") or "none"
        raise UsageError(f"{', '.join(unknown)}: not an option of method {config.method}, which has {allowed}")
    if "std" in parameters:
        given["std"] = base.config.initializer_range
    if needs_importance(config):
        given["importance"] = importance
    if config.positions != "even" and config.after is None:
        if "after" not in parameters or config.method == "adept":
            raise UsageError(f"positions {config.positions}: method {config.method} has no positions to choose")
        given["after"] = choose_positions(config, method, layers, given)
    return _continue(base, dataclasses.replace(method(layers, **given), experts=experts))


def _continue(base: Checkpoint, plan: Plan) -> Plan:
    """Append the plan to the history of its base."""
    if base.growth is None:
        return plan
    return plan.continues(Plan.from_json(base.growth, str(base.folder / "growth.json")))


def _make_experts(config: GrowthOptions, base: Checkpoint) -> Experts | None:
    """The experts that the options ask for, if any."""
    options: dict[str, Any] = {"count": config.experts, "top_k": config.top_k, "granularity": config.granularity}
    options |= {"upcycle": config.upcycle, "router_std": config.router_std}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if not given and config.method != "moe":
        return None
    if config.seed is not None:
        given["seed"] = config.seed
    if config.noise_ratio is not None and (config.method == "moe" or given.get("upcycle") in ("noise", "drop")):
        given["ratio"] = config.noise_ratio
    given.setdefault("router_std", base.config.initializer_range)
    return Experts(**given)


def needs_importance(config: GrowthOptions) -> bool:
    """Whether the plan depends on the weights."""
    return config.method == "adept" and config.after is None and config.plan is None
