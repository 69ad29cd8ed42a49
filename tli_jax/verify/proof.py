"""The proof: base and grown model run side by side from disk, a layer at a time, and every logit is compared.

What is run are the bytes that were written. Both models go through one compiled block, because in bf16 two programs of
the same mathematics need not agree in the last bit. As long as both have the same hidden states and the next layer of
both holds the same bytes, the work is done once.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.cli.console import finite
from tli_jax.errors import ProofError
from tli_jax.growth.plan import Plan
from tli_jax.hf.checkpoint import Checkpoint, read_chunks, read_tensor
from tli_jax.hf.tokens import MIN_TOKENS
from tli_jax.models.tree import pick
from tli_jax.verify.layers import embed, head_name, normalise, read_layer, run_layer

MAX_TOKENS, WINDOW = 4096, 512
SECONDS = 60.0
_SLICE_BYTES = 16 * 2**20
_ARITHMETIC_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Change:
    """What one injected layer does to the hidden state: relative change and cosine, means over all tokens."""

    layer: int
    relative_change: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was found. Losses and KL in nats per token, KL of the grown model from the base; ``top1`` is the share of
    tokens on whose most likely successor both agree; ``parted_at`` is the first grown layer after which hidden states
    differ, None where they never do."""

    tokens: int
    text: str
    dtype: str
    device: str
    max_abs_logit: float
    max_abs_logit_difference: float
    kl: float
    loss_base: float
    loss_grown: float
    top1: float
    parted_at: int | None
    changes: tuple[Change, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For ``growth.json``; numbers that are not finite are null."""
        return finite(dataclasses.asdict(self))


def choose_tokens(base: Checkpoint, plan: Plan, seconds: float = SECONDS) -> int:
    """Number of tokens with which the proof takes about ``seconds``, measured on the first layer; 128 to 4096."""
    params = read_layer(base, 0)
    x = jnp.zeros((1, MIN_TOKENS, base.config.hidden_size), params["input_layernorm"]["weight"].dtype)
    run_layer(base.config, params, x).block_until_ready()
    started = time.perf_counter()
    run_layer(base.config, params, x).block_until_ready()
    per_token = (time.perf_counter() - started) / MIN_TOKENS
    # Every expert runs on every token here.
    layers = layers_to_run(plan) * (plan.experts.count if plan.experts else 1)
    # The head costs as much as its parameters are layers; both models need it.
    layers += 2 * base.config.vocab_size * base.config.hidden_size / base.config.layer_params
    affordable = int(seconds / (per_token * layers))
    return max(MIN_TOKENS, min(MAX_TOKENS, affordable // WINDOW * WINDOW or affordable))


def layers_to_run(plan: Plan) -> int:
    """How many layers a proof runs: all of the grown model, and the base's from where the two must part."""
    shared = 0
    for row in plan.rows if plan.experts is None else ():
        if row.is_base_layer and row.sources[0][0] == shared:
            shared += 1
        elif row.scale != 0:
            break
    return len(plan) + plan.base_layers - shared


def prove(
    base: Checkpoint, grown: Checkpoint, plan: Plan, tokens_BT: np.ndarray, text: str, step: Callable[[], None]
) -> Proof:
    """Run both models on the tokens and compare them; see ``check`` for what must hold.

    Args:
        base, grown: opened folders; only one layer, or one slice of embedding or head, of each is in memory at a time.
        tokens_BT: ids, at least two a row.
        text: what the tokens are, for the record.
        step: called once for every layer run.
    """
    started = time.perf_counter()
    x_base, x_grown, parted_at, changes = _run_layers(base, grown, plan, tokens_BT, step)
    stats = _compare_logits(base, grown, x_base, x_grown, tokens_BT)
    return Proof(
        tokens=tokens_BT.size,
        text=text,
        dtype=str(x_base.dtype),
        device=jax.devices()[0].device_kind,
        parted_at=parted_at,
        changes=tuple(changes),
        seconds=time.perf_counter() - started,
        **stats,
    )


def check(plan: Plan, proof: Proof) -> None:
    """Hold the proof against what the plan promises.

    Raises:
        ProofError: a promise is not kept; says in which layer the models part.
    """
    where = "in the head" if proof.parted_at is None else f"after layer {proof.parted_at} of the grown model"
    if plan.guarantee == "bit" and (proof.parted_at is not None or proof.max_abs_logit_difference != 0):
        raise ProofError(
            f"the plan promises the same function bit for bit, but the models part {where}"
            f" (max |Δlogit| {proof.max_abs_logit_difference:g}): the output is not what was planned"
        )
    relative = proof.max_abs_logit_difference / max(proof.max_abs_logit, 1e-30)
    if plan.guarantee == "arithmetic" and proof.dtype == "float32" and not relative <= _ARITHMETIC_TOLERANCE:
        raise ProofError(
            f"the plan promises equality but for rounding, but logits differ by {relative:.1e} relative, {where}"
        )


def _run_layers(
    base: Checkpoint, grown: Checkpoint, plan: Plan, tokens_BT: np.ndarray, step: Callable[[], None]
) -> tuple[jax.Array, jax.Array, int | None, list[Change]]:
    config = base.config
    x_base, x_grown = embed(base, tokens_BT), embed(grown, tokens_BT)
    # Experts are another program than the feed-forward that they stand for: from the first layer on nothing is shared.
    parted_at = None if plan.experts is None and _same(x_base, x_grown) else 0
    changes = []
    next_base = 0
    for number, row in enumerate(plan.rows):
        params = read_layer(grown, number)
        y = run_layer(grown.config, params, x_grown)
        if row.injected:
            changes.append(Change(number, *map(float, _change(x_grown, y))))
        if parted_at is None:
            if row.is_base_layer and row.sources[0][0] == next_base:
                is_same_layer = _holds(base, next_base, params)
                x_base = y if is_same_layer else run_layer(config, read_layer(base, next_base), x_base)
                next_base += 1
            if not _same(x_base, y):
                parted_at = number
        # Waited for, and let go of, before the next layer is read: layers must not queue up in memory.
        x_grown = y.block_until_ready()
        del params
        step()
    for layer in range(next_base, config.num_hidden_layers):
        x_base = run_layer(config, read_layer(base, layer), x_base).block_until_ready()
        step()
    return x_base, x_grown, parted_at, changes


def _holds(checkpoint: Checkpoint, layer: int, params: dict[str, Any]) -> bool:
    """Whether a layer on disk holds the same bytes as params in memory; read through a small buffer."""

    def holds(name: str) -> bool:
        bytes_here = np.asarray(pick(params, name)).reshape(-1).view(np.uint8)
        at = 0
        for tensor in checkpoint.stored(name, [layer]).tensors:
            for chunk in read_chunks(tensor):
                if not np.array_equal(bytes_here[at : at + len(chunk)], chunk):
                    return False
                at += len(chunk)
        return True

    return all(holds(name) for name in checkpoint.config.layer_tensors)


def _same(a: Any, b: Any) -> bool:
    return a is b or np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@jax.jit
def _change(x_BTD: jax.Array, y_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)
    norm_x, norm_y = jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(y, axis=-1)
    relative = jnp.linalg.norm(y - x, axis=-1) / norm_x
    return relative.mean(), ((x * y).sum(-1) / (norm_x * norm_y)).mean()


def _compare_logits(
    base: Checkpoint, grown: Checkpoint, x_base: jax.Array, x_grown: jax.Array, tokens_BT: np.ndarray
) -> dict[str, float]:
    """Logits of both, a slice of the vocabulary at a time, with running softmax statistics."""
    config = base.config
    name = head_name(config)
    heads = base.tensors[name], grown.tensors[name]
    norms = [jnp.asarray(read_tensor(c.tensors["model.norm.weight"])) for c in (base, grown)]
    h_base, h_grown = (
        normalise(config.rms_norm_eps, norm_D, x).reshape(-1, x.shape[-1])
        for norm_D, x in zip(norms, (x_base, x_grown), strict=True)
    )
    is_same_hidden = _same(h_base, h_grown)
    # The last token of a window has no successor in it, the first is nobody's: pair each with the next.
    targets_N = jnp.asarray(np.roll(tokens_BT, -1, axis=1).reshape(-1))
    rows = max(1, _SLICE_BYTES * config.vocab_size // heads[0].nbytes)
    stats = _start(h_base.shape[0])
    for start in range(0, config.vocab_size, rows):
        weights = [read_tensor(head, slice(start, start + rows)) for head in heads]
        is_shared = is_same_hidden and _same(weights[0], weights[1])
        logits = _logits(h_base, weights[0])
        other = logits if is_shared else _logits(h_grown, weights[1])
        stats = _update(stats, logits, other, targets_N, start)
    return _finish(stats, tokens_BT.shape)


@jax.jit
def _logits(h_ND: jax.Array, weight_VD: jax.Array) -> jax.Array:
    return jnp.einsum("nd,vd->nv", h_ND, weight_VD).astype(jnp.float32)


class _Stats(NamedTuple):
    """Running softmax statistics over slices of the vocabulary; first dim S: base, grown. Both go through the same
    operations, so that equal logits give equal statistics."""

    max_SN: Any
    sum_SN: Any
    top_SN: Any
    target_SN: Any
    weighted_N: Any
    difference: Any
    largest: Any


def _start(N: int) -> _Stats:
    zero = jnp.zeros((2, N))
    return _Stats(zero - jnp.inf, zero, zero.astype(jnp.int32), zero, zero[0], jnp.zeros(()), jnp.zeros(()))


@jax.jit
def _update(stats: _Stats, base_NV: jax.Array, grown_NV: jax.Array, targets_N: jax.Array, start: int) -> _Stats:
    logits_SNV = jnp.stack([base_NV, grown_NV])
    best_SN = logits_SNV.max(-1)
    max_SN = jnp.maximum(best_SN, stats.max_SN)
    fade_SN = jnp.exp(stats.max_SN - max_SN)
    exp_SNV = jnp.exp(logits_SNV - max_SN[..., None])
    # NaN would get lost in a maximum: the same NaN on both sides is no difference, any other is an infinite one.
    is_same_NV = (base_NV == grown_NV) | (jnp.isnan(base_NV) & jnp.isnan(grown_NV))
    difference_NV = jnp.where(is_same_NV, 0.0, jnp.abs(base_NV - grown_NV))
    difference_NV = jnp.where(jnp.isnan(difference_NV), jnp.inf, difference_NV)
    at_N = targets_N - start
    is_here_N = (at_N >= 0) & (at_N < base_NV.shape[1])
    picked_SN = jnp.take_along_axis(logits_SNV, at_N[None, :, None], axis=-1, mode="clip")[..., 0]
    return _Stats(
        max_SN=max_SN,
        sum_SN=stats.sum_SN * fade_SN + exp_SNV.sum(-1),
        top_SN=jnp.where(best_SN > stats.max_SN, logits_SNV.argmax(-1) + start, stats.top_SN),
        target_SN=jnp.where(is_here_N, picked_SN, stats.target_SN),
        weighted_N=stats.weighted_N * fade_SN[0] + (exp_SNV[0] * (base_NV - grown_NV)).sum(-1),
        difference=jnp.maximum(stats.difference, difference_NV.max()),
        largest=jnp.maximum(stats.largest, jnp.abs(base_NV).max()),
    )


def _finish(stats: _Stats, shape: tuple[int, ...]) -> dict[str, float]:
    wide = _Stats(*(np.asarray(value, np.float64) for value in stats))
    normaliser_SN = wide.max_SN + np.log(wide.sum_SN)
    # Not the last token of each window: its successor is not known.
    losses = (normaliser_SN - wide.target_SN).reshape(2, *shape)[:, :, :-1].mean((1, 2))
    kl_N = wide.weighted_N / wide.sum_SN[0] - normaliser_SN[0] + normaliser_SN[1]
    return {
        "max_abs_logit": float(wide.largest),
        "max_abs_logit_difference": float(wide.difference),
        "kl": float(kl_N.mean()),
        "loss_base": float(losses[0]),
        "loss_grown": float(losses[1]),
        "top1": float((wide.top_SN[0] == wide.top_SN[1]).mean()),
    }
