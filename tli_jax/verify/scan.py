"""The losses of many plans of one base, without growing any of them.

The base is loaded once. One compiled program runs layers in any order: their numbers, the factors on their residual
outputs and their count are arguments of the program. No plan is compiled, copied or written. Plans run in sorted order,
so that a plan starts where it first differs from the one before: hidden states are kept at the layers where plans part.
On accelerators, the layers at the end that several plans share run once, with the plans as one batch.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from tli_jax.distributed.kernels import choose_attention, choose_dispatch
from tli_jax.distributed.mesh import AXES, batch_degree, batch_sharding, constrain
from tli_jax.distributed.vocabulary import sharded_cross_entropy, sharded_lookup
from tli_jax.errors import UsageError
from tli_jax.growth.initialisers import combine
from tli_jax.growth.plan import Plan
from tli_jax.growth.rows import COMPUTED_INITS, label
from tli_jax.models.attention import make_rope
from tli_jax.models.config import LlamaConfig
from tli_jax.models.cross_entropy import token_cross_entropy
from tli_jax.models.llama import Block, ForwardOptions, Llama, Params
from tli_jax.models.loss import next_tokens

KEPT_BYTES = 2**31  # of hidden states, over all devices
_CAPACITY = 1024  # layers in one call of the program; deeper plans take several
# Tokens that keep an accelerator busy. A CPU is busy with one plan, whose loss then does not depend on its batch.
_BATCH_TOKENS = 2**14


class Step(NamedTuple):
    """A layer to run: the weighted sum of two base layers, with its residual outputs times ``scale``."""

    sources: tuple[int, int]
    weights: tuple[float, float]
    scale: float


def scan(
    config: LlamaConfig,
    params: Params,
    tokens_BT: Any,
    plans: Sequence[Plan],
    on_loss: Callable[[int, float], object] = lambda index, loss: None,
) -> list[float]:
    """The loss that each plan would have right after growth, on the same tokens, without growing.

    Args:
        params: of the base, as from ``load_hf``, on one device or sharded over a mesh (see ``param_sharding``).
        tokens_BT: int token ids ``[B, T]``, the same in all processes; -1 is padding.
        plans: any order. Layers that are the identity are skipped, so an exact plan has the loss of the base.
        on_loss: called with the index and the loss of each plan as soon as it is known, in the order of the run.

    Returns:
        Mean cross-entropy in nats per token, in the order of ``plans``. Computed in the dtype of the params.

    Raises:
        UsageError: a plan is for another depth, makes experts, or has a layer that an initialiser computes from more
            than base weights and factors (``noise``, ``random``, ``transport``, ``predictor``).

    Example::

        import numpy as np
        import tli_jax

        config, params = tli_jax.load_hf("embedded", dtype="float32")
        L = config.num_hidden_layers
        tokens_BT = np.arange(256).reshape(2, 128)
        plans = [tli_jax.tli(L, after=[layer], init="half") for layer in range(L)]
        print(tli_jax.scan(config, params, tokens_BT, plans))
    """
    return Scanner(config, params, np.asarray(tokens_BT)).losses([to_steps(plan, config) for plan in plans], on_loss)


def to_steps(plan: Plan, config: LlamaConfig) -> tuple[Step, ...]:
    """The layers that a plan runs, without those that are the identity. Raises as ``scan`` does."""
    if plan.base_layers != config.num_hidden_layers:
        raise UsageError(
            f"{plan.method}: made for a base of {plan.base_layers} layers, this one has {config.num_hidden_layers}"
        )
    if plan.experts is not None:
        raise UsageError(f"{plan.method}: a growth that makes experts cannot be scanned: grow it and evaluate it")
    steps = []
    for number, row in enumerate(plan.rows):
        if row.scale == 0:
            continue
        first, *others = row.sources
        if row.init in COMPUTED_INITS or len(others) > 1:
            raise UsageError(
                f"{plan.method}: layer {number} ({label(row)}, init {row.init}) cannot be scanned: grow it and evaluate"
                " it"
            )
        second = others[0] if others else (first[0], 0.0)
        steps.append(Step((first[0], second[0]), (first[1], second[1]), row.scale))
    return tuple(steps)


def base_steps(layers: int) -> tuple[Step, ...]:
    """The layers of the base, unchanged."""
    return tuple(Step((layer, layer), (1.0, 0.0), 1.0) for layer in range(layers))


class Scanner:
    """A base and the tokens to measure on. Args as in ``scan``.

    Attributes:
        batch: plans in a batch.
        layers_run: layers run so far, each once for a batch.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: Params,
        tokens_BT: np.ndarray,
        kept_bytes: int = KEPT_BYTES,
        batch: int | None = None,
    ):
        self.config, self.params = config, params
        sharding = params["norm"]["weight"].sharding
        mesh: Any = sharding.mesh if isinstance(sharding, NamedSharding) else None
        mesh = mesh if mesh is not None and mesh.axis_names == AXES else None
        self.options = _options(config, params, mesh, tokens_BT.shape[1] - 1)
        self.tokens_BT: Any = tokens_BT
        if mesh is not None:
            # Rows of padding, which have no loss.
            rows = np.pad(tokens_BT, ((0, -len(tokens_BT) % batch_degree(mesh)), (0, 0)), constant_values=-1)
            sharding = batch_sharding(mesh, ("B", "T"))
            self.tokens_BT = jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
        self.embedded_BTD = _embed(config, self.options, params, self.tokens_BT)
        self.max_kept = max(1, kept_bytes // self.embedded_BTD.nbytes)
        is_cpu = jax.default_backend() == "cpu"
        self.batch = batch or (1 if is_cpu else max(1, _BATCH_TOKENS // tokens_BT.size))
        self.layers_run = 0

    def losses(
        self, plans: Sequence[tuple[Step, ...]], on_loss: Callable[[int, float], object] = lambda index, loss: None
    ) -> list[float]:
        """The loss of each plan, see ``scan``."""
        order = sorted(range(len(plans)), key=plans.__getitem__)
        shared = [_shared(plans[a], plans[b]) for a, b in itertools.pairwise(order)] + [0]
        kept = {0: self.embedded_BTD}  # hidden states by the number of steps done, of the plan before
        start, losses = 0, [0.0] * len(plans)
        for first in range(0, len(order), self.batch):
            group = order[first : first + self.batch]
            common = _shared_end([plans[index] for index in group])
            states = []
            for place, index in enumerate(group, first):
                steps, end = plans[index], len(plans[index]) - common
                kept = {depth: x for depth, x in kept.items() if depth <= start}
                depth = max(depth for depth in kept if depth <= end)
                x_BTD = kept[depth]
                for stop in _partings(shared[place:], depth, end):
                    x_BTD = self.run(steps[depth:stop], x_BTD)
                    self._keep(kept, stop, x_BTD)
                    depth = stop
                states.append(self.run(steps[depth:end], x_BTD))
                start = shared[place]
            for index, loss in zip(group, self._finish(plans[group[0]], common, states), strict=True):
                losses[index] = loss
                on_loss(index, loss)
        return losses

    def _finish(self, steps: Sequence[Step], common: int, states: list[jax.Array]) -> list[float]:
        """Run the last ``common`` of ``steps``, which a group of plans shares, as one batch. Returns their losses."""
        count = len(states)
        states += states[-1:] * (self.batch - count)  # so that all batches have one shape
        x_NTD = self.run(steps[len(steps) - common :], _join(states) if self.batch > 1 else states[0])
        return _losses(self.config, self.options, self.params, x_NTD, self.tokens_BT).tolist()[:count]

    def run(self, steps: Sequence[Step], x_BTD: jax.Array) -> jax.Array:
        """Hidden states ``[B, T-1, D]`` after these steps."""
        self.layers_run += len(steps)
        for first in range(0, len(steps), _CAPACITY):
            part = steps[first : first + _CAPACITY]
            padded = [*part, *base_steps(1) * (_CAPACITY - len(part))]
            sources, weights, scales = (np.asarray(column) for column in zip(*padded, strict=True))
            arguments = sources.astype(np.int32), weights.astype(np.float32), scales.astype(np.float32)
            x_BTD = _run(self.config, self.options, self.params["layers"], x_BTD, arguments, np.int32(len(part)))
        return x_BTD

    def _keep(self, kept: dict[int, jax.Array], depth: int, x_BTD: jax.Array) -> None:
        """Keep hidden states, and drop every second one if they are too many: what is dropped is recomputed."""
        kept[depth] = x_BTD
        if len(kept) > self.max_kept + 1:
            for other in sorted(kept)[1::2]:
                del kept[other]


def _shared(a: Sequence[Step], b: Sequence[Step]) -> int:
    """The number of equal steps at the start."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shared_end(plans: Sequence[Sequence[Step]]) -> int:
    """The number of steps at the end that all plans share. 0 for a single plan, which nothing is shared with."""
    reverse = [plan[::-1] for plan in plans]
    return min((_shared(reverse[0], other) for other in reverse[1:]), default=0)


def _partings(shared: Sequence[int], start: int, end: int) -> list[int]:
    """The depths after ``start``, up to ``end``, at which later plans part from the current one.

    Args:
        shared: steps that the current plan shares with the next, that one with the one after it, and so on.
    """
    partings, least = set(), None
    for depth in shared:
        least = depth if least is None else min(least, depth)
        if least <= start:
            break
        if least <= end:
            partings.add(least)
    return sorted(partings)


def _options(config: LlamaConfig, params: Params, mesh: Any, T: int) -> ForwardOptions:
    dtype = params["norm"]["weight"].dtype
    if mesh is None:
        return ForwardOptions(dtype)
    attention_impl, _ = choose_attention("auto", mesh, T, config.head_dim, str(dtype), isolate=False)
    return ForwardOptions(
        dtype,
        attention_impl=attention_impl,
        dispatch=choose_dispatch(mesh)[0],
        lookup=sharded_lookup(mesh),
        cross_entropy=functools.partial(sharded_cross_entropy, mesh),
        constrain=functools.partial(constrain, mesh),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(config: LlamaConfig, options: ForwardOptions, params: Params, tokens_BT: jax.Array) -> jax.Array:
    model = Llama.from_params(config, params)
    x_BTD = model.embed_tokens(jnp.maximum(tokens_BT[:, :-1], 0), options.dtype, options.lookup)
    return options.constrain(x_BTD, "BTD")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    config: LlamaConfig,
    options: ForwardOptions,
    layers: Params,
    x_BTD: jax.Array,
    steps: tuple[jax.Array, jax.Array, jax.Array],
    count: jax.Array,
) -> jax.Array:
    """Run ``count`` steps. ``steps`` are the sources ``[N, 2]``, weights ``[N, 2]`` and scales ``[N]``."""
    T = x_BTD.shape[1]
    rope = make_rope(config, T, x_BTD.dtype)._replace(attend=options.attention_impl(T, None))

    def take(layer: jax.Array) -> Params:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), layers)

    def body(number: jax.Array, x_BTD: jax.Array) -> jax.Array:
        (first, second), (weight, other), scale = (column[number] for column in steps)
        params = jax.lax.cond(
            (weight == 1) & (other == 0),
            lambda: take(first),
            lambda: jax.tree.map(lambda a, b: combine([a, b], [weight, other], 1), take(first), take(second)),
        )
        block = Block.from_params(config, params)
        x_BTD = block.run_scaled(x_BTD, scale.astype(x_BTD.dtype), rope=rope, dispatch=options.dispatch)
        return options.constrain(x_BTD, "BTD")

    return jax.lax.fori_loop(0, count, body, x_BTD)


@jax.jit
def _join(states: list[jax.Array]) -> jax.Array:
    """Hidden states of several plans as one batch. The plans of a sequence are neighbours, so no sequence is moved."""
    x_BPTD = jnp.stack(states, axis=1)
    return x_BPTD.reshape(-1, *x_BPTD.shape[2:])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses(
    config: LlamaConfig, options: ForwardOptions, params: Params, x_NTD: jax.Array, tokens_BT: jax.Array
) -> jax.Array:
    """The loss of each plan of a batch ``[B * P, T-1, D]``, given the hidden states after the last layer."""
    P = len(x_NTD) // len(tokens_BT)
    model, targets_BT = Llama.from_params(config, params), next_tokens(tokens_BT)
    x_NTD, head_VD = model.norm(x_NTD), model.head_weight[...]
    targets_NT = jnp.repeat(targets_BT, P, axis=0)
    losses: Any = token_cross_entropy(options.cross_entropy, None, x_NTD, head_VD, targets_NT)
    return losses[0].reshape(-1, P, targets_BT.shape[1]).sum((0, 2)) / (targets_BT >= 0).sum()
