"""Embedding and cross-entropy over a mesh: each collective is placed by hand and sums in fp32.

The compiler's own choice all-gathers the table, and all-reduces the gradients of table and head whole, once a chunk.
"""

import functools
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from tli_jax.distributed.mesh import BATCH, PARAM_RULES
from tli_jax.models.cross_entropy import Chunked, Derivatives, chunked_cross_entropy
from tli_jax.models.embedding import Lookup, rows, sum_rows

_D, (_V,) = PARAM_RULES["D"], PARAM_RULES["V"]
_REPLICAS = tuple(axis for axis in BATCH if axis not in _D)
_BT, _TABLE = PartitionSpec(BATCH), PartitionSpec(_V, _D)


def sharded_lookup(mesh: Mesh) -> Lookup:
    """Look-up in a table whose dim D is sharded like the batch: devices exchange tokens and parts of rows, not tables.

    A device looks up its part of D for the tokens of all devices that hold the other parts; an all-to-all then gives
    each device all parts of its own tokens.
    """

    def local(tokens_BT: jax.Array, V: int) -> jax.Array:
        tokens_BT = jax.lax.all_gather(tokens_BT, _D, tiled=True)
        return tokens_BT - jax.lax.axis_index(_V) * V

    def find(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
        found_BTD = rows(table_VD, local(tokens_BT, table_VD.shape[0]), dtype)
        found_BTD = jax.lax.psum(found_BTD, _V)  # exact: one term is not 0
        return jax.lax.all_to_all(found_BTD, _D, split_axis=0, concat_axis=2, tiled=True)

    def add(gradient_BTD: jax.Array, tokens_BT: jax.Array, *, V: int) -> jax.Array:
        gradient_BTD = jax.lax.all_to_all(gradient_BTD, _D, split_axis=2, concat_axis=0, tiled=True)
        return jax.lax.psum(sum_rows(gradient_BTD, local(tokens_BT, V), V), _REPLICAS)

    def sharded_rows(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
        run = jax.shard_map(
            functools.partial(find, dtype=dtype), mesh=mesh, in_specs=(_TABLE, _BT), out_specs=_BT, check_vma=False
        )
        return run(table_VD, tokens_BT)

    def sharded_sum(gradient_BTD: jax.Array, tokens_BT: jax.Array, V: int) -> jax.Array:
        run = jax.shard_map(
            functools.partial(add, V=V // mesh.shape[_V]),
            mesh=mesh,
            in_specs=(_BT, _BT),
            out_specs=_TABLE,
            check_vma=False,
        )
        return run(gradient_BTD, tokens_BT)

    return Lookup(sharded_rows, sharded_sum)


def sharded_cross_entropy(
    mesh: Mesh,
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    *given_BT: jax.Array,
    derivatives: Derivatives | None = None,
    is_head_trained: bool = False,
    chunk: int | None = None,
) -> Chunked:
    """``chunked_cross_entropy`` with tokens sharded like a batch and the head like a parameter.

    The head is all-gathered over D once, in the dtype of x; its fp32 gradient is reduce-scattered once. Logits stay
    sharded over V.
    """

    def local(x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, *given_BT: jax.Array) -> Chunked:
        head_VD = jax.lax.all_gather(head_VD.astype(x_BTD.dtype), _D, axis=1, tiled=True)
        found = chunked_cross_entropy(
            *(x_BTD, head_VD, targets_BT, *given_BT),
            derivatives=derivatives,
            is_head_trained=is_head_trained,
            chunk=chunk,
            axis=_V,
        )
        if found.head_gradient is None:
            return found
        gradient_VD = jax.lax.psum_scatter(found.head_gradient, _D, scatter_dimension=1, tiled=True)
        gradient_VD = jax.lax.psum(gradient_VD, _REPLICAS)
        # The backward pass of the layers waits for the sum, or the whole gradient would be kept until its end.
        x_gradient, gradient_VD = jax.lax.optimization_barrier((found.x_gradient, gradient_VD))
        return found._replace(x_gradient=x_gradient, head_gradient=gradient_VD)

    has_gradient = derivatives is not None
    out = Chunked(_BT, _BT, _BT if has_gradient else None, _TABLE if has_gradient and is_head_trained else None)  # type: ignore[arg-type]
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(_BT, _TABLE, _BT, *[_BT] * len(given_BT)), out_specs=out, check_vma=False
    )
    return run(x_BTD, head_VD, targets_BT, *given_BT)
