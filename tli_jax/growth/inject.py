"""Injection: the pure function that applies a plan to layer-stacked params."""

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tli_jax.errors import UsageError
from tli_jax.growth.initialisers import HostInits, combine, compute
from tli_jax.growth.plan import Plan
from tli_jax.growth.rows import HOST_INITS, RESIDUAL_OUTPUTS, is_residual_output


def inject(params: Any, plan: Plan, layers: str = "layers", outputs: Collection[str] = RESIDUAL_OUTPUTS) -> Any:
    """Grow layer-stacked params. Pure: works under ``jit``, ``grad`` and ``eval_shape``, and on sharded arrays.

    Args:
        params: any pytree: nested dicts, an ``nnx.Module``, an ``nnx.State``. The leaves below the key or attribute
            ``layers`` have a leading layer dim; all other leaves are returned as they are.
        layers: name of the layer-stacked subtree.
        outputs: names of the residual outputs, whose weights and biases a row's scale multiplies.

    Returns:
        The same tree with ``len(plan)`` layers. Leaves keep their sharding, unless the layer dim itself is sharded, and
        no device holds more than its shard.

    Raises:
        UsageError: no ``layers``, a leaf with another depth than the plan's base, or an initialiser that cannot run
            here.

    Example:
        >>> config, params = tli_jax.load_hf("embedded")
        >>> grown = tli_jax.inject(params, tli_jax.tli(config.num_hidden_layers, every=4))
    """

    def name_of(path: tuple[Any, ...]) -> str | None:
        """The name within a layer, or None outside of the layers."""
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
        # NNX variables are pytree nodes with a single child, "value".
        return ".".join(n for n in names[names.index(layers) + 1 :] if n != "value") if layers in names else None

    paths = jax.tree_util.tree_leaves_with_path(params)
    leaves = {name: leaf for path, leaf in paths if (name := name_of(path)) is not None}
    if not leaves:
        raise UsageError(f"the params have no subtree {layers!r}: name the one with the stacked layers with layers=")
    for name, leaf in leaves.items():
        if not leaf.shape or leaf.shape[0] != plan.base_layers:
            raise UsageError(
                f"{layers}.{name} has shape {tuple(leaf.shape)}, but the plan is for {plan.base_layers} layers"
            )
    on_host = _compute_on_host(leaves, plan, outputs)

    def grow(path: tuple[Any, ...], leaf: Any) -> Any:
        name = name_of(path)
        return leaf if name is None else _grow_leaf(leaf, plan, name, is_residual_output(name, outputs), on_host)

    return jax.tree_util.tree_map_with_path(grow, params)


OnHost = dict[tuple[int, str], Any]


def _compute_on_host(leaves: dict[str, Any], plan: Plan, outputs: Collection[str]) -> OnHost:
    """The tensors of host initialisers, by row number and name; under ``jit`` through a callback."""
    keys = [
        (number, name)
        for name in leaves
        for number, row in enumerate(plan.rows)
        if row.init in HOST_INITS and row.action(is_residual_output(name, outputs)) == "compute"
    ]
    if not keys:
        return {}

    def run(leaves: dict[str, Any]) -> list[Any]:
        leaves = {name: np.asarray(leaf) for name, leaf in leaves.items()}
        inits = HostInits(plan, lambda layer, name: leaves[name][layer])
        # Transport caches results of the current layer, the predictor those of the current tensor.
        order = keys if plan.is_by_kind else sorted(keys, key=lambda key: key[0])
        tensors = {
            (number, name): inits.tensor(number, name, is_residual_output(name, outputs), leaves[name].dtype)
            for number, name in order
        }
        return [tensors[key] for key in keys]

    if not any(isinstance(leaf, Tracer) for leaf in leaves.values()):
        tensors = run(leaves)
    elif plan.is_by_kind:
        # The predictor is trained by JAX, and a callback must not call JAX.
        raise UsageError(f"{plan.method}: init predictor trains a network, so call inject outside of jit")
    else:
        shapes = [jax.ShapeDtypeStruct(leaves[name].shape[1:], leaves[name].dtype) for _, name in keys]
        tensors = jax.pure_callback(run, shapes, leaves)
    return dict(zip(keys, tensors, strict=True))


def _grow_leaf(leaf: jax.Array, plan: Plan, name: str, is_output: bool, on_host: OnHost) -> jax.Array:
    """Gather the first source of each row, then overwrite the rows that are not copies."""
    actions = [row.action(is_output) for row in plan.rows]
    first = [row.sources[0][0] for row in plan.rows]
    grown = jnp.take(leaf, np.asarray(first), axis=0, mode="clip")

    zero = [number for number, action in enumerate(actions) if action == "zero"]
    if zero:
        grown = grown.at[np.asarray(zero)].set(0)

    combined: dict[int, list[int]] = defaultdict(list)  # by number of sources
    for number, action in enumerate(actions):
        if action == "combine":
            combined[len(plan.rows[number].sources)].append(number)
    for numbers in combined.values():
        rows = [plan.rows[number] for number in numbers]

        def column(values: list[float]) -> np.ndarray:
            return np.asarray(values, np.float32).reshape(-1, *[1] * (leaf.ndim - 1))

        by_source = list(zip(*(row.sources for row in rows), strict=True))
        sources = [jnp.take(leaf, np.asarray([s for s, _ in part]), axis=0, mode="clip") for part in by_source]
        weights = [column([w for _, w in part]) for part in by_source]
        scale = column([row.factor(is_output) for row in rows])
        grown = grown.at[np.asarray(numbers)].set(combine(sources, weights, scale))

    for number, (row, action) in enumerate(zip(plan.rows, actions, strict=True)):
        if action == "compute":
            tensor = on_host.get((number, name))
            if tensor is None:
                tensor = compute(row.init, leaf[first[number]], number, name, row.factor(is_output), plan.options)
            grown = grown.at[number].set(tensor)
    return grown
