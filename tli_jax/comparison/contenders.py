"""What takes part in a comparison: the baselines, and the methods brought to one size."""

import dataclasses
import re
from typing import Any

from tli_jax.cli.config import CompareConfig
from tli_jax.cli.parse import growth_config
from tli_jax.cli.yaml_file import plain
from tli_jax.errors import UsageError
from tli_jax.growth.sizes import fit
from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.models.config import LlamaConfig
from tli_jax.upscaling.options import make_plan

BASE, OLD_LAYERS, RANDOM = "base", "old_layers", "random"
# Of a growth, what is not the comparison's to say.
_NOT_A_METHOD = {
    *("model", "revision", "output", "train", "shape", "sample", "plan_only", "json", "overwrite", "proof"),
    *("max_shard_size", "seed"),
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to a model that is trained.

    Args:
        method: of growth; None for the baselines.
        growth: the options of the method, by which the model is made from the base.
        is_drawn: whether the model is another one for each seed.
        only: for each kind of run that there is, ``all`` and ``injected``, what trains in it.
    """

    name: str
    method: str | None
    growth: dict[str, Any]
    is_drawn: bool
    only: dict[str, str]

    @property
    def file_name(self) -> str:
        return file_name(self.name)


def make_contenders(config: CompareConfig, base: Checkpoint) -> tuple[list[Contender], dict[str, str]]:
    """The baselines and the methods, each with the options that bring it to the common size; and, by name, why some
    are left out.

    Raises:
        UsageError: an option is wrong, or two are called the same.
    """
    layers = base.config.num_hidden_layers
    every = config.every
    if every > layers:
        raise UsageError(f"every is {every}, must be 1…{layers}")
    found = [Contender(BASE, None, {}, False, {"all": "all"} if config.baselines else {})]
    if config.baselines:
        old = ",".join(str(layer) for layer in range(every - 1, layers, every))
        found.append(Contender(OLD_LAYERS, None, {}, False, {"injected": f"layers({old})"}))
        found.append(Contender(RANDOM, None, {}, True, {"all": "all"}))
    left_out, plans = {}, {}
    for given in config.methods:
        growth = {key: value for key, value in given.items() if key != "name"}
        start = growth.get("init") or growth.get("upcycle")
        name = str(given.get("name") or f"{growth.get('method')}" + (f":{start}" if start else ""))
        where = f"methods: {name}"
        if not re.fullmatch(r"[\w.:+-]+", name) or any(file_name(name) == one.file_name for one in found):
            raise UsageError(f"{where}: must be a name of its own, of letters, digits and . : + - _")
        if foreign := sorted(_NOT_A_METHOD & growth.keys()):
            raise UsageError(f"{where}: {', '.join(foreign)} is not for a method to say: leave it out")
        read = dataclasses.asdict(growth_config(growth, where))
        growth = {key: read[key] for key in growth}
        method = growth["method"]
        options = fit(method, layers, every, growth)
        if options is None:
            left_out[name] = f"the smallest that {method} makes has more than {layers + layers // every} layers"
            continue
        growth |= options
        if "experts" in growth or method == "moe":
            growth |= _fit_experts(growth, base.config, every)
        plan = make_plan(growth_config(growth, where), base, [0.0] * layers)
        twin = next((one for one, rows in plans.items() if rows == (plan.rows, plan.experts)), None)
        if twin is not None:
            left_out[name] = f"it is {twin}, layer by layer"
            continue
        plans[name] = plan.rows, plan.experts
        is_drawn = "seed" in plan.options or plan.experts is not None
        only = {"all": "all"} | ({"injected": "injected"} if any(plan.injected) else {})
        found.append(Contender(name, method, plain(growth), is_drawn, only))
    return found, left_out


def _fit_experts(growth: dict[str, Any], base: LlamaConfig, every: int) -> dict[str, Any]:
    """How many experts a token goes through, so that it meets about as many parameters as in the deeper model.

    Two at least: the weight of a single one is always 1, and the router would have no gradient.
    """
    if growth.get("top_k") or growth["method"] != "moe":
        return {}
    layers = base.num_hidden_layers
    in_feed_forward = 3 * base.hidden_size * base.intermediate_size
    more = layers // every * base.layer_params / (layers * in_feed_forward)
    return {"top_k": max(2, round(1 + more)) * growth.get("granularity", 1)}


def file_name(name: str) -> str:
    """Of a contender."""
    return name.replace(":", "-")
