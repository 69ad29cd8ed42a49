"""Optimizers and schedules, from optax. What is done to a tensor goes by its dims, never by its rank."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tli_jax.cli.config import TrainConfig
from tli_jax.cli.values import Group
from tli_jax.training.freezing import ParamSpec

GROUPS: tuple[Group, ...] = ("kept", "injected", "outer")


def make_schedule(config: TrainConfig, group: Group) -> optax.Schedule:
    """The learning rate of a group at step s = 1, 2, …: up in a line over the warm-up, then as the schedule says."""
    peak = config.learning_rate.get(group, config.learning_rate["all"])
    warmup = config.warmup.get(group, config.warmup["all"])
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, config.steps - warmup), config.final_fraction)
    elif config.schedule == "wsd":
        decay = round(config.steps * config.decay_fraction)
        flat = max(0, config.steps - warmup - decay)
        fall = optax.linear_schedule(peak, peak * config.final_fraction, max(1, decay))
        after = optax.join_schedules([optax.constant_schedule(peak), fall], [flat])
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def scale_by_rates(config: TrainConfig, leaves: Sequence[ParamSpec]) -> optax.GradientTransformation:
    """Multiply each layer of each leaf with minus the learning rate of its group."""
    schedules = {group: make_schedule(config, group) for group in GROUPS}
    index = {leaf.name: np.asarray([GROUPS.index(group) for group in leaf.groups]) for leaf in leaves}

    def update(updates: Any, state: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
        count = state + 1
        rates = jnp.stack([jnp.asarray(schedules[group](count), jnp.float32) for group in GROUPS])

        def scale(name: str, update: jax.Array) -> jax.Array:
            rate = rates[index[name]].reshape(-1, *[1] * (update.ndim - 1))
            return -rate.astype(update.dtype) * update

        return {name: scale(name, update) for name, update in updates.items()}, count

    # The state is the number of updates so far.
    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)  # type: ignore[arg-type]


def _per_matrix(leaf: ParamSpec, transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same on each layer of a stack by itself, and each expert, for what looks at a whole array: its two largest
    dims, its mean."""
    stacked = bool(leaf.layers) + (len(leaf.dims) == 4)
    for _ in range(stacked):
        transformation = optax.GradientTransformation(jax.vmap(transformation.init), jax.vmap(transformation.update))
    return transformation


def _adafactor() -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _as_large_as_adam_s(update: jax.Array) -> jax.Array:
    return 0.2 * max(update.shape[-2:]) ** 0.5 * update


def make_optimizer(config: TrainConfig, leaves: Sequence[ParamSpec]) -> optax.GradientTransformation:
    """The update of the leaves that train, a dict by their names: clip, direction, weight decay, learning rate.

    AdamW (arXiv 1711.05101), Lion (arXiv 2302.06675), Adafactor (arXiv 1804.04235, factored within a layer), or Muon
    for the matrices of the layers, with updates of AdamW's size (arXiv 2502.16982), and AdamW for the rest.
    """
    leaves = [leaf for leaf in leaves if leaf.trains]
    b1, b2 = config.adam.get("b1", 0.9), config.adam.get("b2", 0.95)
    adam = optax.scale_by_adam(b1, b2, config.adam.get("eps", 1e-8), mu_dtype=config.moment_dtype)
    is_matrix = {leaf.name: bool(leaf.layers) and len(leaf.dims) > 2 for leaf in leaves}
    # Not the router, whose rows are what it knows of each expert, as an embedding's are of each token.
    is_muons = {leaf.name: is_matrix[leaf.name] and leaf.dims[-2] != "E" for leaf in leaves}
    if config.optimizer == "adamw":
        direction = adam
    elif config.optimizer == "lion":
        direction = optax.scale_by_lion(b1, b2, mu_dtype=config.moment_dtype)
    elif config.optimizer == "muon":
        # Matrices of layers are [L, out, in] or [L, E, out, in]: told, since by rank a stacked norm would pass for one.
        def dims(updates: Any) -> Any:
            return jax.tree.map(lambda u: optax.contrib.MuonDimensionNumbers(u.ndim - 1, u.ndim - 2), updates)

        muon = optax.chain(
            optax.contrib.scale_by_muon(mu_dtype=config.moment_dtype, weight_dimension_numbers=dims),
            optax.stateless(lambda updates, _: jax.tree.map(_as_large_as_adam_s, updates)),
        )
        labels = {name: "muon" if matrix else "adam" for name, matrix in is_muons.items()}
        direction = optax.partition({"muon": muon, "adam": adam}, labels)
    else:
        direction = optax.partition(
            {leaf.name: _per_matrix(leaf, _adafactor()) for leaf in leaves},
            {leaf.name: leaf.name for leaf in leaves},
        )
    decayed = {leaf.name: is_matrix[leaf.name] or leaf.tensor.startswith("lm_head") for leaf in leaves}
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts += [direction, optax.add_decayed_weights(config.weight_decay, decayed), scale_by_rates(config, leaves)]
    return optax.chain(*parts)
