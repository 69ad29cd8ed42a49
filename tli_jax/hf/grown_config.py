"""Configuration of a grown model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tli_jax.errors import UsageError
from tli_jax.growth.plan import Plan
from tli_jax.models.config import LlamaConfig


def grown_config(config: LlamaConfig, plan: Plan) -> LlamaConfig:
    """What a plan makes of a model of that configuration.

    Raises:
        UsageError: it makes experts, and there are some already, or the feed-forward cannot be cut as it says.
    """
    grown, experts = config.with_layers(len(plan)), plan.experts
    if experts is None:
        return grown
    if config.num_experts:
        raise UsageError(
            f"{plan.method}: the base has {config.num_experts} experts a layer: only a dense one gets some"
        )
    return dataclasses.replace(
        grown,
        num_experts=experts.total,
        experts_per_token=experts.top_k,
        intermediate_size=experts.expert_size(config.intermediate_size),
    )


def grow_config(raw: Mapping[str, Any], config: LlamaConfig, plan: Plan) -> dict[str, Any]:
    """``config.json`` of the grown model: all of the base's, the depth and every per-layer list rewritten, and what
    experts need.

    A per-layer list is one whose key speaks of layers and that is as long as the base is deep.
    """

    def grow(key: str, value: Any) -> Any:
        if isinstance(value, list) and "layer" in key and len(value) == plan.base_layers:
            return [value[row.sources[0][0]] for row in plan.rows]
        return value

    grown = {key: grow(key, value) for key, value in raw.items()} | {"num_hidden_layers": len(plan)}
    return grown if plan.experts is None else grown_config(config, plan).as_mixtral(grown)
