"""The embedding look-up, with a gradient that is summed in fp32."""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp


class Rows(Protocol):
    """``rows``, or the same over a mesh."""

    def __call__(self, table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array: ...


class SumRows(Protocol):
    """``sum_rows``, or the same over a mesh."""

    def __call__(self, gradient_BTD: jax.Array, tokens_BT: jax.Array, V: int) -> jax.Array: ...


def rows(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """The rows of ``tokens_BT``, ``[B, T, D]`` in ``dtype``. Tokens outside the table give zeros."""
    return table_VD.at[tokens_BT].get(mode="fill", fill_value=0, wrap_negative_indices=False).astype(dtype)


def sum_rows(gradient_BTD: jax.Array, tokens_BT: jax.Array, V: int) -> jax.Array:
    """The transpose of ``rows``, fp32 ``[V, D]``: for each row of the table, the sum over its tokens."""
    tokens_N = tokens_BT.reshape(-1)
    outside = (tokens_N < 0) | (tokens_N >= V)
    tokens_N = jnp.where(outside, V, tokens_N)
    # In sorted order, since in a batch of real text the same few rows collide thousands of times.
    order_N = jnp.argsort(tokens_N, stable=True)
    gradient_ND = gradient_BTD.reshape(-1, gradient_BTD.shape[-1])[order_N].astype(jnp.float32)
    zeros_VD = jnp.zeros((V, gradient_ND.shape[1]), jnp.float32)
    return zeros_VD.at[tokens_N[order_N]].add(gradient_ND, mode="drop", indices_are_sorted=True)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Look-up and gradient of an embedding."""

    rows: Rows = rows
    sum_rows: SumRows = sum_rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def look_up(lookup: Lookup, dtype: Any, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The embedding of ``tokens_BT``, ``[B, T, D]`` in ``dtype``.

    The gradient is summed in fp32 whatever ``dtype`` is: in bf16, a sum over thousands of tokens stops growing.
    """
    return lookup.rows(table_VD, tokens_BT, dtype)


def _forward(lookup: Lookup, dtype: Any, table_VD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, Any]:
    return lookup.rows(table_VD, tokens_BT, dtype), (tokens_BT, jnp.zeros((table_VD.shape[0], 0), table_VD.dtype))


def _backward(lookup: Lookup, dtype: Any, saved: Any, gradient_BTD: jax.Array) -> tuple[jax.Array, None]:
    tokens_BT, like_table = saved
    V = like_table.shape[0]
    return lookup.sum_rows(gradient_BTD, tokens_BT, V).astype(like_table.dtype), None


look_up.defvjp(_forward, _backward)
