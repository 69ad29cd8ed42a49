"""The configuration of a grown model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tli_jax.errors import UsageError
from tli_jax.growth.plan import Plan
from tli_jax.models.config import LlamaConfig


def grown_config(config: LlamaConfig, plan: Plan) -> LlamaConfig:
    """The configuration of the model that a plan makes from a model with ``config``.

    Raises:
        UsageError: the plan makes experts, but the base already has some, or its feed-forward cannot be split so.
    """
    grown, experts = config.with_layers(len(plan)), plan.experts
    if experts is None:
        return grown
    if config.num_experts:
        raise UsageError(f"{plan.method}: the base already has {config.num_experts} experts a layer: use a dense one")
    return dataclasses.replace(
        grown,
        num_experts=experts.total,
        experts_per_token=experts.top_k,
        intermediate_size=experts.expert_size(config.intermediate_size),
    )


def grow_config(raw: Mapping[str, Any], config: LlamaConfig, plan: Plan) -> dict[str, Any]:
    """The ``config.json`` of the grown model: the base's, with the new depth, per-layer lists and experts.

    A per-layer list is one with "layer" in its key and as many items as the base has layers.
    """

    def grow(key: str, value: Any) -> Any:
        if isinstance(value, list) and "layer" in key and len(value) == plan.base_layers:
            return [value[row.sources[0][0]] for row in plan.rows]
        return value

    grown = {key: grow(key, value) for key, value in raw.items()} | {"num_hidden_layers": len(plan)}
    return grown if plan.experts is None else grown_config(config, plan).as_mixtral(grown)
