"""Upcycling: the pure function that turns dense feed-forwards into experts.

Arithmetic is in fp32 and rounded once to the stored dtype. In memory and from file to file, an expert's tensor is made
by the same compiled function.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.errors import UsageError
from tli_jax.growth.experts import MATRICES, Experts
from tli_jax.growth.initialisers import random_key, round_statistic, salt_of


def upcycle(params: Any, experts: Experts, layers: str = "layers") -> Any:
    """Turn dense layer-stacked params into those of a Mixtral. Pure: works under ``jit`` and ``eval_shape``.

    Args:
        params: nested dicts; ``params[layers]["mlp"]`` is replaced by ``block_sparse_moe``.

    Returns:
        The same tree with ``block_sparse_moe.gate.weight`` ``[L, E, D]``, and ``block_sparse_moe.experts.w1.weight``
        and w3 ``[L, E, F/G, D]`` and w2 ``[L, E, D, F/G]``, in the dtypes of the dense tensors.

    Raises:
        UsageError: there is no dense feed-forward, or G does not divide F.

    Example:
        >>> config, params = tli_jax.load_hf("embedded")
        >>> mixture = tli_jax.upcycle(params, tli_jax.Experts(count=4, top_k=2))
    """
    tree = dict(params[layers])
    if "mlp" not in tree:
        raise UsageError(f"upcycle: {layers} have no mlp: only a dense model can be made a mixture of experts")
    dense = {name: tree["mlp"][name]["weight"] for name in MATRICES}
    del tree["mlp"]
    L, F, D = dense["gate_proj"].shape
    experts.expert_size(F)  # refuses a G that does not divide F
    rows, numbers = jnp.arange(L, dtype=jnp.uint32), jnp.arange(experts.total, dtype=jnp.uint32)

    def all_experts(name: str) -> jax.Array:
        per_expert = functools.partial(_make_expert, experts, name == "down_proj", salt_of(name))
        per_layer = jax.vmap(per_expert, in_axes=(None, None, 0))
        return jax.vmap(per_layer, in_axes=(0, 0, None))(dense[name], rows, numbers)

    dtype = dense["gate_proj"].dtype
    tree["block_sparse_moe"] = {
        "gate": {"weight": jax.vmap(lambda row: _make_router(experts, D, dtype, row))(rows)},
        "experts": {target: {"weight": all_experts(name)} for name, target in MATRICES.items()},
    }
    return {**params, layers: tree}


def make_expert(experts: Experts, name: str, dense: Any, row: int, expert: int) -> jax.Array:
    """Return a tensor of one expert.

    Args:
        name: ``gate_proj``, ``up_proj`` or ``down_proj``.
        dense: that tensor of the layer, ``[F, D]``, or ``[D, F]`` for ``down_proj``.
        row: number of the grown layer. The random key depends on it, the seed, the expert and the name.
    """
    return _make_expert(experts, name == "down_proj", salt_of(name), dense, np.uint32(row), np.uint32(expert))


def make_router(experts: Experts, D: int, dtype: Any, row: int) -> jax.Array:
    """Return the router of one layer, ``[E, D]``."""
    return _make_router(experts, D, np.dtype(dtype), np.uint32(row))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _make_expert(
    experts: Experts, is_down: bool, salt: jax.Array, dense: jax.Array, row: jax.Array, expert: jax.Array
) -> jax.Array:
    method, G = experts.upcycle, experts.granularity
    if method == "copy":
        return dense
    x = dense.astype(jnp.float32)
    if method.startswith("virtual_groups"):
        parts = x.reshape(x.shape[0], G, -1).swapaxes(0, 1) if is_down else x.reshape(G, -1, x.shape[1])
        factor = G if is_down else 1
        if method == "virtual_groups_published":
            factor = (experts.total * G / experts.top_k) ** (1 / 3)
        return (parts[expert % G] * np.float32(factor)).astype(dense.dtype)
    noise = jax.random.normal(jax.random.fold_in(random_key(experts.seed, row, salt), expert), dense.shape, jnp.float32)
    if method == "noise":
        rms = round_statistic(jnp.sqrt(jnp.mean(jnp.square(x))))
        return (x + experts.noise_ratio * rms * noise).astype(dense.dtype)
    # The key of the permutation does not depend on the name: all three matrices resample the same units.
    axis = 1 if is_down else 0
    F = dense.shape[axis]
    count = round(experts.noise_ratio * F)
    order_F = jax.random.permutation(jax.random.fold_in(random_key(experts.seed, row, salt_of("drop")), expert), F)
    is_new = jnp.expand_dims(jnp.zeros(F, bool).at[order_F[:count]].set(True), 1 - axis)
    entries = max(count * dense.shape[1 - axis], 1)
    mean = round_statistic(jnp.sum(jnp.where(is_new, x, 0.0)) / entries)
    std = round_statistic(jnp.sqrt(jnp.sum(jnp.where(is_new, jnp.square(x - mean), 0.0)) / entries))
    return jnp.where(is_new, mean + std * noise, x).astype(dense.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _make_router(experts: Experts, D: int, dtype: Any, row: jax.Array) -> jax.Array:
    key = random_key(experts.seed, row, salt_of("router"))
    rows = experts.router_std * jax.random.normal(key, (experts.count, D), jnp.float32)
    # The G parts of a copy have equal rows, so that a token is routed to all or none of them.
    return jnp.repeat(rows, experts.granularity, axis=0).astype(dtype)
