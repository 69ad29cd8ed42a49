"""Injection: the pure function that turns layer-stacked params into deeper ones, as a plan says."""

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tli_jax.errors import UsageError
from tli_jax.growth.initialisers import Hosts, combine, compute
from tli_jax.growth.plan import HOST_INITS, RESIDUAL_OUTPUTS, Plan, is_residual_output


def inject(params: Any, plan: Plan, layers: str = "layers", outputs: Collection[str] = RESIDUAL_OUTPUTS) -> Any:
    """Grow layer-stacked params. Pure: works under ``jit``, ``grad`` and ``eval_shape``, and on sharded arrays.

    Args:
        params: any pytree: nested dicts, an NNX module, an NNX state. Each leaf below a key or attribute called
            ``layers`` has the layers as its leading dim; all other leaves pass untouched.
        plan: what to make; see ``tli_jax.growth.plan``.
        layers: name of the subtree that is layer-stacked.
        outputs: names of the residual outputs, the only tensors (biases included) that a row's scale multiplies.

    Returns:
        The same tree, with leaves below ``layers`` as deep as the plan. A leaf that is sharded over other dims than the
        first stays so, and no device sees more of it than its share.

    Raises:
        UsageError: nothing is called ``layers``, or a leaf there is not as deep as the plan's base; or an initialiser
            of the plan cannot work here, see ``tli_jax.growth.initialisers``.
    """

    def name_of(path: tuple[Any, ...]) -> str | None:
        """The name within a layer; None outside."""
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
        # NNX variables are pytree nodes of their own, whose one child is called "value".
        return ".".join(n for n in names[names.index(layers) + 1 :] if n != "value") if layers in names else None

    found = {
        name: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if (name := name_of(path)) is not None
    }
    if not found:
        raise UsageError(f"the params have nothing called {layers!r}: name the layer-stacked subtree with layers=")
    for name, leaf in found.items():
        if not leaf.shape or leaf.shape[0] != plan.base_layers:
            raise UsageError(
                f"{layers}.{name} has shape {tuple(leaf.shape)}, the plan needs {plan.base_layers} layers first"
            )
    made = _make_on_host(found, plan, outputs)

    def grow(path: tuple[Any, ...], leaf: Any) -> Any:
        name = name_of(path)
        return leaf if name is None else _grow_leaf(leaf, plan, name, is_residual_output(name, outputs), made)

    return jax.tree_util.tree_map_with_path(grow, params)


Made = dict[tuple[int, str], Any]


def _make_on_host(leaves: dict[str, Any], plan: Plan, outputs: Collection[str]) -> Made:
    """The tensors that initialisers on the host make, by row and name; under ``jit`` by a call back to the host."""

    def wants(number: int, name: str) -> bool:
        row = plan.rows[number]
        return row.init in HOST_INITS and row.action(is_residual_output(name, outputs)) == "compute"

    # Kind by kind, as what learns from a kind of tensor does so once.
    wanted = [(number, name) for name in leaves for number in range(len(plan)) if wants(number, name)]
    if not wanted:
        return {}

    def make(leaves: dict[str, Any]) -> list[Any]:
        leaves = {name: np.asarray(leaf) for name, leaf in leaves.items()}
        hosts = Hosts(plan, lambda layer, name: leaves[name][layer])
        order = wanted if plan.is_by_kind else sorted(wanted, key=lambda one: one[0])
        tensors = {one: hosts.tensor(*one, is_residual_output(one[1], outputs), leaves[one[1]].dtype) for one in order}
        return [tensors[one] for one in wanted]

    if not any(isinstance(leaf, Tracer) for leaf in leaves.values()):
        made = make(leaves)
    elif plan.is_by_kind:
        # It trains by JAX itself, and a call back from JAX must not call JAX.
        raise UsageError(f"{plan.method}: init predictor trains a network, so call inject outside of jit")
    else:
        shapes = [jax.ShapeDtypeStruct(leaves[name].shape[1:], leaves[name].dtype) for _, name in wanted]
        made = jax.pure_callback(make, shapes, leaves)
    return dict(zip(wanted, made, strict=True))


def _grow_leaf(leaf: jax.Array, plan: Plan, name: str, is_output: bool, made: Made) -> jax.Array:
    """A gather of whole layers, then the rows that are more than a copy written over it."""
    actions = [row.action(is_output) for row in plan.rows]
    first = [row.sources[0][0] for row in plan.rows]
    grown = jnp.take(leaf, np.asarray(first), axis=0, mode="clip")

    zero = [number for number, action in enumerate(actions) if action == "zero"]
    if zero:
        grown = grown.at[np.asarray(zero)].set(0)

    combined: dict[int, list[int]] = defaultdict(list)
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

    for number, action in enumerate(actions):
        if (number, name) in made:
            grown = grown.at[number].set(made[number, name])
        elif action == "compute":
            row = plan.rows[number]
            tensor = compute(row.init, leaf[first[number]], number, name, row.factor(is_output), plan.options)
            grown = grown.at[number].set(tensor)
    return grown
