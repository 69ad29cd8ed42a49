"""The proof: base and grown model run side by side from disk, a layer at a time, and every logit is compared.

What is run are the bytes that were written. Both models go through one compiled block, because in bf16 two programs of
the same mathematics need not agree in the last bit. As long as both have the same hidden states and the next layer of
both holds the same bytes, the work is done once.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.checkpoint.hf import Checkpoint, hf_name, read_tensor
from tli_jax.errors import ProofError
from tli_jax.growth.plan import Plan
from tli_jax.models.config import LAYER_TENSORS, LlamaConfig
from tli_jax.models.llama import Block, RMSNorm, make_rope, nest

MIN_TOKENS, MAX_TOKENS, WINDOW = 128, 4096, 512
SECONDS = 60.0
_SLICE_BYTES = 32 * 2**20
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
        return dataclasses.asdict(self)


def choose_tokens(base: Checkpoint, plan: Plan, seconds: float = SECONDS) -> int:
    """Number of tokens with which the proof takes about ``seconds``, measured on the first layer; 128 to 4096."""
    params = _layer(base, 0)
    x = jnp.zeros((1, MIN_TOKENS, base.config.hidden_size), params["mlp"]["up_proj"]["weight"].dtype)
    _block(base.config, params, x).block_until_ready()
    started = time.perf_counter()
    _block(base.config, params, x).block_until_ready()
    per_token = (time.perf_counter() - started) / MIN_TOKENS
    layers = len(plan) + (0 if plan.is_exact else plan.base_layers)
    # The head costs as much as its parameters are layers; both models need it.
    layers += 2 * base.config.vocab_size * base.config.hidden_size / base.config.layer_params
    affordable = int(seconds / (per_token * layers))
    return max(MIN_TOKENS, min(MAX_TOKENS, affordable // WINDOW * WINDOW or affordable))


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
    if plan.exactness == "bit" and (proof.parted_at is not None or proof.max_abs_logit_difference != 0):
        raise ProofError(
            f"the plan promises the same function bit for bit, but the models part {where}"
            f" (max |Δlogit| {proof.max_abs_logit_difference:g}): the output is not what was planned"
        )
    relative = proof.max_abs_logit_difference / max(proof.max_abs_logit, 1e-30)
    if plan.exactness == "arithmetic" and proof.dtype == "float32" and not relative <= _ARITHMETIC_TOLERANCE:
        raise ProofError(f"the plan promises equality but for rounding, but logits differ by {relative:.1e} relative, {where}")


def _run_layers(
    base: Checkpoint, grown: Checkpoint, plan: Plan, tokens_BT: np.ndarray, step: Callable[[], None]
) -> tuple[jax.Array, jax.Array, int | None, list[Change]]:
    config = base.config
    x_base = x_grown = _embed(base, tokens_BT)
    parted_at = None if _same(_embed(grown, tokens_BT), x_base) else 0
    changes = []
    next_base = 0
    for number, row in enumerate(plan.rows):
        params = _layer(grown, number)
        y = _block(config, params, x_grown)
        if row.injected:
            changes.append(Change(number, *map(float, _change(x_grown, y))))
        if parted_at is None:
            is_next = row.is_base_layer and row.sources[0][0] == next_base and not row.injected
            if is_next:
                base_params = _layer(base, next_base)
                next_base += 1
                x_base = y if _same_bytes(base_params, params) else _block(config, base_params, x_base)
            if not _same(x_base, y):
                parted_at = number
        x_grown = y
        step()
    for layer in range(next_base, config.num_hidden_layers):
        x_base = _block(config, _layer(base, layer), x_base)
        step()
    return x_base, x_grown, parted_at, changes


@functools.partial(jax.jit, static_argnums=0)
def _block(config: LlamaConfig, params: dict[str, Any], x_BTD: jax.Array) -> jax.Array:
    """One layer of either model: the one compiled program that both go through."""
    return Block(config, params)(x_BTD, make_rope(config, x_BTD.shape[1], x_BTD.dtype))[0]


@functools.partial(jax.jit, static_argnums=0)
def _norm(eps: float, weight_D: jax.Array, x_BTD: jax.Array) -> jax.Array:
    return RMSNorm(weight_D, eps)(x_BTD).reshape(-1, x_BTD.shape[-1])


def _layer(checkpoint: Checkpoint, layer: int) -> dict[str, Any]:
    return nest({name: read_tensor(checkpoint.tensors[hf_name(name, layer)]) for name in LAYER_TENSORS})


def _embed(checkpoint: Checkpoint, tokens_BT: np.ndarray) -> jax.Array:
    """Rows of the embedding that the tokens need, read one by one."""
    table = checkpoint.tensors["model.embed_tokens.weight"]
    used, inverse = np.unique(tokens_BT, return_inverse=True)
    rows = np.concatenate([read_tensor(table, slice(token, token + 1)) for token in used.tolist()])
    return jnp.asarray(rows[inverse.reshape(tokens_BT.shape)])


def _same_bytes(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in pairs)


def _same(a: jax.Array, b: jax.Array) -> bool:
    return a is b or _same_bytes(np.asarray(a), np.asarray(b))


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
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    heads = base.tensors[name], grown.tensors[name]
    norms = [jnp.asarray(read_tensor(c.tensors["model.norm.weight"])) for c in (base, grown)]
    h_base = _norm(config.rms_norm_eps, norms[0], x_base)
    h_grown = _norm(config.rms_norm_eps, norms[1], x_grown)
    is_same_hidden = _same(h_base, h_grown)
    # The last token of a window has no successor in it, the first is nobody's: pair each with the next.
    targets_N = jnp.asarray(np.roll(tokens_BT, -1, axis=1).reshape(-1))
    rows = max(1, _SLICE_BYTES * config.vocab_size // heads[0].nbytes)
    stats = _start(h_base.shape[0])
    for start in range(0, config.vocab_size, rows):
        weights = [read_tensor(head, slice(start, start + rows)) for head in heads]
        is_shared = is_same_hidden and _same_bytes(weights[0], weights[1])
        logits = _logits(h_base, weights[0])
        other = logits if is_shared else _logits(h_grown, weights[1])
        stats = _update(stats, logits, other, targets_N, start)
    return _finish(stats, tokens_BT.shape)


@jax.jit
def _logits(h_ND: jax.Array, weight_VD: jax.Array) -> jax.Array:
    return jnp.einsum("nd,vd->nv", h_ND, weight_VD).astype(jnp.float32)


def _start(N: int) -> dict[str, jax.Array]:
    low, zero = jnp.full(N, -jnp.inf), jnp.zeros(N)
    side = {"max": low, "sum": zero, "top": jnp.zeros(N, jnp.int32), "target": zero}
    return {
        **{f"base_{key}": value for key, value in side.items()},
        **{f"grown_{key}": value for key, value in side.items()},
        "weighted": zero,
        "difference": jnp.zeros(()),
        "largest": jnp.zeros(()),
    }


@jax.jit
def _update(
    stats: dict[str, jax.Array], base_NV: jax.Array, grown_NV: jax.Array, targets_N: jax.Array, start: int
) -> dict[str, jax.Array]:
    new = dict(stats)
    for side, logits in (("base", base_NV), ("grown", grown_NV)):
        best, old = logits.max(-1), stats[f"{side}_max"]
        top = jnp.maximum(best, old)
        new[f"{side}_max"] = top
        new[f"{side}_sum"] = stats[f"{side}_sum"] * jnp.exp(old - top) + jnp.exp(logits - top[:, None]).sum(-1)
        new[f"{side}_top"] = jnp.where(best > old, logits.argmax(-1) + start, stats[f"{side}_top"])
        at = targets_N - start
        is_here = (at >= 0) & (at < logits.shape[1])
        picked = jnp.take_along_axis(logits, jnp.clip(at, 0, logits.shape[1] - 1)[:, None], axis=1)[:, 0]
        new[f"{side}_target"] = jnp.where(is_here, picked, stats[f"{side}_target"])
    top = new["base_max"]
    weighted = (jnp.exp(base_NV - top[:, None]) * (base_NV - grown_NV)).sum(-1)
    new["weighted"] = stats["weighted"] * jnp.exp(stats["base_max"] - top) + weighted
    new["difference"] = jnp.maximum(stats["difference"], jnp.abs(base_NV - grown_NV).max())
    new["largest"] = jnp.maximum(stats["largest"], jnp.abs(base_NV).max())
    return new


def _finish(stats: dict[str, jax.Array], shape: tuple[int, ...]) -> dict[str, float]:
    s = {key: np.asarray(value, np.float64) for key, value in stats.items()}
    normaliser = {side: s[f"{side}_max"] + np.log(s[f"{side}_sum"]) for side in ("base", "grown")}

    def loss(side: str) -> float:
        # Not the last token of each window: its successor is not known.
        return float((normaliser[side] - s[f"{side}_target"]).reshape(shape)[:, :-1].mean())

    kl = s["weighted"] / s["base_sum"] - normaliser["base"] + normaliser["grown"]
    return {
        "max_abs_logit": float(s["largest"]),
        "max_abs_logit_difference": float(s["difference"]),
        "kl": float(kl.mean()),
        "loss_base": loss("base"),
        "loss_grown": loss("grown"),
        "top1": float((s["base_top"] == s["grown_top"]).mean()),
    }
