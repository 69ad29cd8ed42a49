"""Options of growth, for upscale, preflight and train. Every field is a YAML key and a flag (see ``cli.parse``)."""

from typing import Annotated, Literal

import pydantic
from pydantic.dataclasses import dataclass

from tli_jax.cli.keys import EXPERTS, GROWTH
from tli_jax.cli.values import Layers, Number, PathText, Text, Whole, one_of, option
from tli_jax.growth.experts import UPCYCLES
from tli_jax.growth.methods import METHODS
from tli_jax.growth.rows import INITS

Method = Annotated[str, one_of(METHODS)]
Init = Annotated[str, one_of(INITS)]
Upcycle = Annotated[str, one_of(UPCYCLES)]


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class GrowthOptions:
    """What to grow. Options of the methods are ``None`` unless given."""

    method: Method = option("tli", "growth method", GROWTH, choices=METHODS)
    every: Whole | None = option(None, "tli, average: inject after every K base layers", GROWTH, shown="4")
    init: Init | None = option(None, "tli: initialiser of injected layers", GROWTH, choices=INITS, shown="identity")
    scale: Number | None = option(
        None, "tli: factor on the residual outputs, with init scaled, noise, random, transport or predictor", GROWTH
    )
    after: Layers | None = option(None, "inject after these base layers instead, e.g. 3,7,11", GROWTH)
    positions: Literal["even", "inner", "measured"] = option(
        "even",
        "where to inject: as the method does, evenly without the first two layers and the last (for initialisers that"
        " are not exact), or where a scan measured the smallest cost",
        GROWTH,
    )
    scan: PathText | None = option(None, "scan.json of tli-jax scan, for positions measured and for warnings", GROWTH)
    plan: PathText | None = option(None, "plan.json of tli-jax scan, instead of a method", GROWTH)
    remainder: Literal["allow", "error"] | None = option(
        None, "tli: allow a number of layers that is not a multiple of K, or refuse it", GROWTH, shown="allow"
    )
    drop: Whole | None = option(
        None, "dus: layers removed from the end of the first half and the start of the second", GROWTH, shown="L/4"
    )
    groups: Whole | None = option(
        None, "llama_pro: number of groups, a divisor of L", GROWTH, shown="the divisor nearest to L/4"
    )
    block: Whole | None = option(None, "midas, lidas: layers in the repeated block", GROWTH, shown="⌈L/4⌉")
    count: Whole | None = option(None, "adept: number of least important layers to duplicate", GROWTH, shown="⌈L/4⌉")
    copies: Whole | None = option(
        None, "tli, llama_pro, interpose: injected layers at each position", GROWTH, shown="1"
    )
    times: Whole | None = option(None, "stack: how often the layers are repeated", GROWTH, shown="2")
    layers: Text | None = option(None, "custom: the grown layers, e.g. '0-3, 3*0, 4-7, 7*0.5, 8-15'", GROWTH)
    seed: Whole | None = option(None, "tli, lesa, experts: random seed", GROWTH, shown="0")
    noise_ratio: Number | None = option(
        None,
        "noise relative to the root mean square of a tensor; upcycle drop: fraction that is resampled",
        GROWTH,
        shown="0.01; 0.5 for drop",
    )
    experts: Whole | None = option(
        None, "turn each feed-forward into this many experts, with any method", EXPERTS, shown="8 with moe"
    )
    top_k: Whole | None = option(None, "experts per token", EXPERTS, shown="2")
    granularity: Whole | None = option(None, "split each expert into this many smaller ones", EXPERTS, shown="1")
    upcycle: Upcycle | None = option(None, "initialiser of the experts", EXPERTS, choices=UPCYCLES, shown="copy")
    router_std: Number | None = option(
        None, "standard deviation of the router's initial weights", EXPERTS, shown="the model's initializer_range"
    )
