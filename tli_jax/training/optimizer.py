"""Optimizers and learning-rate schedules, built from optax. Each rule follows a tensor's dims, never its rank."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from tli_jax.cli.train_config import TrainConfig
from tli_jax.cli.values import Group
from tli_jax.distributed.matrices import map_matrices
from tli_jax.training.freezing import ParamSpec

GROUPS: tuple[Group, ...] = ("kept", "injected", "outer")


def make_schedule(config: TrainConfig, group: Group) -> optax.Schedule:
    """Learning rate of a parameter group at step 1, 2, …: a linear warm-up, then ``config.schedule``."""
    peak = config.learning_rate.get(group, config.learning_rate["all"])
    warmup = config.warmup.get(group, config.warmup["all"])
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, config.steps - warmup), config.final_fraction)
    elif config.schedule == "wsd":
        decay = round(config.steps * config.decay_fraction)
        stable = max(0, config.steps - warmup - decay)
        fall = optax.linear_schedule(peak, peak * config.final_fraction, max(1, decay))
        after = optax.join_schedules([optax.constant_schedule(peak), fall], [stable])
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def learning_rates(config: TrainConfig, step: jax.Array) -> jax.Array:
    """The learning rate of each group in ``GROUPS`` at a step, fp32 ``[G]``. Skipped steps advance the schedule."""
    return jnp.stack([jnp.asarray(make_schedule(config, group)(step), jnp.float32) for group in GROUPS])


def _scale_by_learning_rates(specs: Sequence[ParamSpec]) -> optax.GradientTransformationExtraArgs:
    """Multiply the update of each layer by minus the learning rate of its group."""
    index = {spec.name: np.asarray([GROUPS.index(group) for group in spec.groups]) for spec in specs}

    def update(updates: Any, state: Any, params: Any = None, *, rates: jax.Array, **_: Any) -> tuple[Any, Any]:
        def scale(name: str, update: jax.Array) -> jax.Array:
            rate = rates[index[name]].reshape(-1, *[1] * (update.ndim - 1))
            return -rate.astype(update.dtype) * update

        return {name: scale(name, update) for name, update in updates.items()}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)  # type: ignore[arg-type]


def _adafactor(spec: ParamSpec) -> optax.GradientTransformation:
    """Adafactor on each layer of a stack, and on each expert, separately: it factors the two largest dims of an array
    and clips by the mean over it."""
    transformation = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    for _ in range(bool(spec.layers) + (len(spec.dims) == 4)):
        transformation = optax.GradientTransformation(jax.vmap(transformation.init), jax.vmap(transformation.update))
    return transformation


def _muon(config: TrainConfig, specs: Sequence[ParamSpec], mesh: Mesh) -> optax.GradientTransformation:
    """Muon on stacks of matrices, ``[L, out, in]`` or ``[L, E, out, in]``, with updates of AdamW's size."""

    def dims(updates: Any) -> Any:
        return jax.tree.map(lambda u: optax.contrib.MuonDimensionNumbers(u.ndim - 1, u.ndim - 2), updates)

    # In two parts, because the momentum stays sharded like the parameters, and orthogonalization needs whole matrices.
    momentum = optax.contrib.scale_by_muon(mu_dtype=config.moment_dtype, weight_dimension_numbers=dims, ns_steps=0)
    newton_schulz = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=dims)

    def orthogonalize(matrices: jax.Array) -> jax.Array:
        # optax.contrib.muon(consistent_rms=0.2) has this scale too, but only together with a weight decay, a learning
        # rate and an AdamW of its own.
        scale = 0.2 * max(matrices.shape[-2:]) ** 0.5
        return scale * newton_schulz.update(matrices, newton_schulz.init(matrices))[0]

    def whole_matrices(updates: Any, _: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: map_matrices(mesh, dims_of[path[-1].key], orthogonalize, x), updates
        )

    dims_of = {spec.name: spec.dims for spec in specs}
    return optax.chain(momentum, optax.stateless(whole_matrices))


def make_optimizer(
    config: TrainConfig, specs: Sequence[ParamSpec], mesh: Mesh
) -> optax.GradientTransformationExtraArgs:
    """Optimizer for the trainable arrays, a dict by ``ParamSpec.name``. Its ``update`` takes ``rates``.

    It clips the gradient's norm, applies AdamW (arXiv 1711.05101), Lion (arXiv 2302.06675), Adafactor (arXiv
    1804.04235, factored within a layer) or Muon (arXiv 2502.16982), adds weight decay, and multiplies by the learning
    rate of each group. Muon updates the matrices of the layers, AdamW the remaining arrays.
    """
    specs = [spec for spec in specs if spec.trains]
    b1, b2 = config.adam.get("b1", 0.9), config.adam.get("b2", 0.95)
    adam = optax.scale_by_adam(b1, b2, config.adam.get("eps", 1e-8), mu_dtype=config.moment_dtype)
    is_matrix = {spec.name: bool(spec.layers) and len(spec.dims) > 2 for spec in specs}
    if config.optimizer == "adamw":
        direction = adam
    elif config.optimizer == "lion":
        direction = optax.scale_by_lion(b1, b2, mu_dtype=config.moment_dtype)
    elif config.optimizer == "muon":
        # The rows of a router are one vector per expert, as those of an embedding are one per token: not for Muon.
        muon_names = {spec.name for spec in specs if is_matrix[spec.name] and spec.dims[-2] != "E"}
        labels = {spec.name: "muon" if spec.name in muon_names else "adam" for spec in specs}
        direction = optax.partition({"muon": _muon(config, specs, mesh), "adam": adam}, labels)
    else:
        direction = optax.partition(
            {spec.name: _adafactor(spec) for spec in specs}, {spec.name: spec.name for spec in specs}
        )
    decayed = {spec.name: is_matrix[spec.name] or spec.tensor.startswith("lm_head") for spec in specs}
    chain = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    chain += [direction, optax.add_decayed_weights(config.weight_decay, decayed)]
    return optax.chain(*chain, _scale_by_learning_rates(specs))
