"""Upcycling: the pure function that turns a dense model's feed-forwards into experts, as a plan's ``Experts`` say.

Arithmetic is in fp32 and rounded once to the stored dtype. One function makes an expert's tensor, in memory and from
file to file alike.
"""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.errors import UsageError
from tli_jax.growth.experts import MATRICES, Experts


def upcycle(params: Any, experts: Experts, layers: str = "layers") -> Any:
    """Dense layer-stacked params as those of a mixture of experts. Pure: works under ``jit`` and ``eval_shape``.

    Args:
        params: nested dicts; ``params[layers]["mlp"]`` is replaced by ``block_sparse_moe``, all else is untouched.

    Returns:
        The same tree with ``block_sparse_moe.gate.weight`` ``[L, E, D]`` and ``block_sparse_moe.experts.w1.weight``, w2
        and w3, ``[L, E, F/G, D]`` or ``[L, E, D, F/G]``, in their dtypes.

    Raises:
        UsageError: there is no dense feed-forward, or G does not divide F.
    """
    tree = dict(params[layers])
    if "mlp" not in tree:
        raise UsageError(f"upcycle: {layers} have no mlp: only a dense model can be made a mixture of experts")
    dense = {name: tree["mlp"][name]["weight"] for name in MATRICES}
    del tree["mlp"]
    L, F, D = dense["gate_proj"].shape
    experts.cut(F)  # refuses what cannot be
    rows, numbers = jnp.arange(L, dtype=jnp.uint32), jnp.arange(experts.total, dtype=jnp.uint32)

    def of_all(name: str) -> jax.Array:
        one = functools.partial(_make_expert, experts, name)
        per_layer = jax.vmap(one, in_axes=(None, None, 0))
        return jax.vmap(per_layer, in_axes=(0, 0, None))(dense[name], rows, numbers)

    like = dense["gate_proj"].dtype
    router = jax.vmap(lambda row: _make_router(experts, D, like, row))(rows)
    tree["block_sparse_moe"] = {
        "gate": {"weight": router},
        "experts": {target: {"weight": of_all(name)} for name, target in MATRICES.items()},
    }
    return {**params, layers: tree}


def make_expert(experts: Experts, name: str, dense: Any, row: int, expert: int) -> jax.Array:
    """One expert's tensor.

    Args:
        name: ``gate_proj``, ``up_proj`` or ``down_proj``.
        dense: that tensor of the layer, ``[F, D]`` or ``[D, F]``.
        row: number of the layer in the grown model; with seed, expert and name it is the random key.
    """
    return _make_expert(experts, name, dense, np.uint32(row), np.uint32(expert))


def make_router(experts: Experts, D: int, dtype: Any, row: int) -> jax.Array:
    """One layer's router, ``[E, D]``."""
    return _make_router(experts, D, np.dtype(dtype), np.uint32(row))


def _key(experts: Experts, row: jax.Array, what: str) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(experts.seed), row), zlib.crc32(what.encode()))


# One program wherever it is called from: the same bytes in memory and file to file.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _make_expert(experts: Experts, name: str, dense: jax.Array, row: jax.Array, expert: jax.Array) -> jax.Array:
    how, G = experts.upcycle, experts.granularity
    is_last = name == "down_proj"  # where F is
    if how == "copy":
        return dense
    wide = dense.astype(jnp.float32)
    if how.startswith("virtual_groups"):
        parts = wide.reshape(wide.shape[0], G, -1).swapaxes(0, 1) if is_last else wide.reshape(G, -1, wide.shape[1])
        factor = G if is_last else 1
        if how == "virtual_groups_published":
            factor = (experts.total * G / experts.top_k) ** (1 / 3)
        return (parts[expert % G] * np.float32(factor)).astype(dense.dtype)
    key = jax.random.fold_in(_key(experts, row, name), expert)
    drawn = jax.random.normal(key, dense.shape, jnp.float32)
    if how == "noise":
        return (wide + experts.share * _steady(jnp.sqrt(jnp.mean(jnp.square(wide)))) * drawn).astype(dense.dtype)
    # Which of F are drawn anew: the same in all three matrices, so of a key without the name.
    axis = 1 if is_last else 0
    F = dense.shape[axis]
    count = round(experts.share * F)
    order_F = jax.random.permutation(jax.random.fold_in(_key(experts, row, "drop"), expert), F)
    is_new = jnp.expand_dims(jnp.zeros(F, bool).at[order_F[:count]].set(True), 1 - axis)
    entries = max(count * dense.shape[1 - axis], 1)
    mean = _steady(jnp.sum(jnp.where(is_new, wide, 0.0)) / entries)
    std = _steady(jnp.sqrt(jnp.sum(jnp.where(is_new, jnp.square(wide - mean), 0.0)) / entries))
    return jnp.where(is_new, mean + std * drawn, wide).astype(dense.dtype)


def _steady(x: jax.Array) -> jax.Array:
    # Rounded to bf16 so that the order in which a program sums does not show in the result.
    return x.astype(jnp.bfloat16).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _make_router(experts: Experts, D: int, dtype: Any, row: jax.Array) -> jax.Array:
    drawn = experts.router_std * jax.random.normal(_key(experts, row, "router"), (experts.count, D), jnp.float32)
    # The parts of one copy have equal rows, so that a token has all of them or none.
    return jnp.repeat(drawn, experts.granularity, axis=0).astype(dtype)
