"""The contenders of a comparison: the baselines, and each method with the options that bring it to the common size."""

import dataclasses
import re
from typing import Any

from tli_jax.cli.config import CompareConfig
from tli_jax.cli.growth_config import UpscaleConfig
from tli_jax.cli.parse import from_values
from tli_jax.cli.yaml_file import plain
from tli_jax.errors import UsageError
from tli_jax.growth.sizes import fit
from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.models.config import LlamaConfig
from tli_jax.reporting.results import BASE, OLD_LAYERS, RANDOM
from tli_jax.upscaling.options import make_plan

# Options of a growth that the comparison sets itself.
_RESERVED = {
    *("model", "revision", "output", "train", "shape", "sample", "plan_only", "json", "overwrite", "proof"),
    *("max_shard_size", "seed"),
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to obtain a model, which is then trained.

    Args:
        method: the growth method. None for a baseline.
        growth: options of the growth.
        is_random: whether each seed gives another model.
        only: the ``only`` of its training runs, under the names ``all`` and ``injected``.
    """

    name: str
    method: str | None
    growth: dict[str, Any]
    is_random: bool
    only: dict[str, str]

    @property
    def file_name(self) -> str:
        return _file_name(self.name)


def make_contenders(config: CompareConfig, base: Checkpoint) -> tuple[list[Contender], dict[str, str]]:
    """All contenders, and the reason for each method that is left out.

    Raises:
        UsageError: an option is invalid, or two contenders have the same name.
    """
    layers, every = base.config.num_hidden_layers, config.every
    if every > layers:
        raise UsageError(f"every is {every}, must be 1…{layers}")
    contenders = [Contender(BASE, None, {}, False, {"all": "all"} if config.baselines else {})]
    if config.baselines:
        old = ",".join(str(layer) for layer in range(every - 1, layers, every))
        contenders.append(Contender(OLD_LAYERS, None, {}, False, {"injected": f"layers({old})"}))
        if "all" in config.only:  # otherwise no run would start from its models
            contenders.append(Contender(RANDOM, None, {}, True, {"all": "all"}))
    left_out, plans = {}, {}
    for options in config.methods:
        growth = {key: value for key, value in options.items() if key != "name"}
        start = growth.get("init") or growth.get("upcycle")
        name = str(options.get("name") or f"{growth.get('method')}" + (f":{start}" if start else ""))
        where = f"methods: {name}"
        if not re.fullmatch(r"[\w.:+-]+", name) or any(_file_name(name) == other.file_name for other in contenders):
            raise UsageError(f"{where}: names must be unique, of letters, digits and . : + - _: choose another name")
        if reserved := sorted(_RESERVED & growth.keys()):
            raise UsageError(f"{where}: {', '.join(reserved)} cannot be set for one method: remove it")
        validated = dataclasses.asdict(from_values(UpscaleConfig, growth, where))
        growth = {key: validated[key] for key in growth}
        method = growth["method"]
        size_options = fit(method, layers, every, growth)
        if size_options is None:
            left_out[name] = f"the smallest model that {method} makes has more than {layers + layers // every} layers"
            continue
        growth |= size_options
        if method == "moe" and not growth.get("top_k"):
            growth["top_k"] = _fit_top_k(base.config, every) * growth.get("granularity", 1)
        plan = make_plan(from_values(UpscaleConfig, growth, where), base, [0.0] * layers)
        twin = next((other for other, rows in plans.items() if rows == (plan.rows, plan.experts)), None)
        if twin is not None:
            left_out[name] = f"it makes the same layers as {twin}"
            continue
        plans[name] = plan.rows, plan.experts
        is_random = "seed" in plan.options or plan.experts is not None
        only = {"all": "all"} | ({"injected": "injected"} if any(plan.injected) else {})
        contenders.append(Contender(name, method, plain(growth), is_random, only))
    return contenders, left_out


def _fit_top_k(base: LlamaConfig, every: int) -> int:
    """Experts per token for about as many active parameters as the deeper models have.

    At least two: the weight of a single expert is always 1, so the router would have no gradient.
    """
    layers = base.num_hidden_layers
    feed_forward = 3 * base.hidden_size * base.intermediate_size
    extra = layers // every * base.layer_params / (layers * feed_forward)
    return max(2, round(1 + extra))


def _file_name(contender: str) -> str:
    return contender.replace(":", "-")
