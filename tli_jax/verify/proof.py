"""The proof: run base and grown model from disk, side by side and layer by layer, and compare every logit.

It runs the bytes that were written. Both models go through one compiled block, because in bf16 two programs for the
same mathematics may differ in the last bit. While both have the same hidden states and their next layers hold the same
bytes, the work is done once.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.cli.console import finite
from tli_jax.data.embedded import embedded_text
from tli_jax.errors import DataError, ProofError, UsageError
from tli_jax.growth.plan import Plan
from tli_jax.hf import hub, tokens
from tli_jax.hf.checkpoint import Checkpoint, open_checkpoint
from tli_jax.hf.tensors import read_chunks
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.models.tree import pick
from tli_jax.verify.layers import embed, read_layer, run_layer
from tli_jax.verify.logits import compare_logits, same_bits

Model = Path | str | Checkpoint
MAX_TOKENS, WINDOW = 4096, 512
SECONDS = 60.0
_ARITHMETIC_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Change:
    """What one injected layer does to the hidden states: relative change and cosine, averaged over all tokens."""

    layer: int
    relative_change: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class Proof:
    """The result of running both models on the same tokens."""

    tokens: int
    text: str  # where the tokens come from
    dtype: str  # of the hidden states
    device: str
    max_abs_logit: float  # of the base
    max_abs_logit_difference: float
    kl: float  # of the grown model from the base, mean, in nats per token
    loss_base: float  # mean cross-entropy, in nats per token
    loss_grown: float
    top1: float  # fraction of tokens for which both models predict the same most likely next token
    parted_at: int | None  # the first grown layer after which the hidden states differ; None if they never do
    changes: tuple[Change, ...]  # one for each injected layer
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For ``growth.json``: null stands for NaN and infinity."""
        return finite(dataclasses.asdict(self))


def prove(base: Model, grown: Model, text: str | None = None, *, max_tokens: int | None = None) -> Proof:
    """Run a base model and a model grown from it on a text, and check the guarantee of the growth.

    The plan is read from the grown model's ``growth.json``. Only one layer of each model is in memory at a time.

    Args:
        base, grown: folders, hub ids, or checkpoints from ``open_checkpoint``.
        text: at least 128 tokens; by default, a text in this package, or random token ids without a tokenizer.
        max_tokens: how many tokens to run at most; by default, as many as take about a minute, up to 4,096.

    Raises:
        ProofError: the models differ more than the plan's guarantee allows.
        UsageError: the grown model was made from a base of another depth.
        DataError: the grown model has no ``growth.json``, or the text is too short.
        MissingInputError, UnavailableError: a model cannot be found.

    Example::

        proof = tli_jax.prove("meta-llama/Llama-3.2-1B", "grown")
        print(proof.max_abs_logit_difference, proof.kl, proof.loss_base, proof.loss_grown)
    """
    base, grown = (m if isinstance(m, Checkpoint) else open_checkpoint(hub.resolve(m)) for m in (base, grown))
    for model in (base, grown):
        model.config.check_runnable(str(model.folder))
    if grown.growth is None:
        raise DataError(f"{grown.folder}: no growth.json, which has the plan: give a model that tli_jax has grown")
    plan = Plan.from_json(grown.growth, str(grown.folder / "growth.json"))
    if plan.base_layers != base.config.num_hidden_layers:
        raise UsageError(
            f"{grown.folder}: was grown from {plan.base_layers} layers, {base.folder} has"
            f" {base.config.num_hidden_layers}: give the model that it was grown from"
        )
    tokenizer, _ = open_tokenizer(base.folder, base.config)
    if tokenizer is None and text is not None:
        raise DataError(f"{base.folder}: no tokenizer for the text: add one, or give no text")
    ids = None if tokenizer is None else tokenizer.encode(embedded_text() if text is None else text)
    source = "random ids" if ids is None else "the embedded text" if text is None else "a given text"
    proof = compare_models(base, grown, plan, choose_windows(base, plan, ids, max_tokens), source)
    check(plan, proof)
    return proof


def choose_windows(base: Checkpoint, plan: Plan, ids: list[int] | None, max_tokens: int | None = None) -> np.ndarray:
    """Windows ``[B, T]`` of token ids for a proof, random ones if ``ids`` is None."""
    count = choose_tokens(base, plan) if max_tokens is None else max(tokens.MIN_TOKENS, max_tokens)
    if ids is None:
        return tokens.random_windows(base.config, count, WINDOW)
    return tokens.windows(ids, base.config, count, WINDOW)


def choose_tokens(base: Checkpoint, plan: Plan, seconds: float = SECONDS) -> int:
    """The number of tokens, 128 to 4,096, for which a proof takes about ``seconds``. Times the first layer."""
    params = read_layer(base, 0)
    x = jnp.zeros((1, tokens.MIN_TOKENS, base.config.hidden_size), params["input_layernorm"]["weight"].dtype)
    run_layer(base.config, params, x).block_until_ready()
    started = time.perf_counter()
    run_layer(base.config, params, x).block_until_ready()
    per_token = (time.perf_counter() - started) / tokens.MIN_TOKENS
    # Here every token goes through every expert.
    layers = layers_to_run(plan) * (plan.experts.count if plan.experts else 1)
    # Each model also has a head, which costs as much as layers with the same number of parameters.
    layers += 2 * base.config.vocab_size * base.config.hidden_size / base.config.layer_params
    affordable = int(seconds / (per_token * layers))
    return max(tokens.MIN_TOKENS, min(MAX_TOKENS, affordable // WINDOW * WINDOW or affordable))


def layers_to_run(plan: Plan) -> int:
    """The number of layers that a proof runs: all of the grown model, and the base's from where the two must differ."""
    shared = 0
    for row in plan.rows if plan.experts is None else ():
        if row.is_base_layer and row.sources[0][0] == shared:
            shared += 1
        elif row.scale != 0:
            break
    return len(plan) + plan.base_layers - shared


def compare_models(
    base: Checkpoint,
    grown: Checkpoint,
    plan: Plan,
    tokens_BT: np.ndarray,
    text: str,
    on_layer: Callable[[], object] = lambda: None,
) -> Proof:
    """Run both models on the tokens and compare them; ``check`` then says whether the guarantee holds.

    Args:
        base, grown: opened folders; one layer, or one slice of embedding or head, of each is in memory at a time.
        tokens_BT: token ids, at least two a row.
        text: where the tokens come from, for the record.
        on_layer: called after every layer.
    """
    started = time.perf_counter()
    x_base, x_grown, parted_at, changes = _run_layers(base, grown, plan, tokens_BT, on_layer)
    stats = compare_logits(base, grown, x_base, x_grown, tokens_BT)
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
    """Check the guarantee of the plan.

    Raises:
        ProofError: it does not hold; the message names the layer where the models start to differ.
    """
    where = "in the head" if proof.parted_at is None else f"after layer {proof.parted_at} of the grown model"
    difference = proof.max_abs_logit_difference
    if plan.guarantee == "bit" and (proof.parted_at is not None or difference != 0):
        raise ProofError(
            f"the plan guarantees the same function bit for bit, but the models differ {where}"
            f" (max |Δlogit| {difference:g}): the written model is not what was planned, grow it again"
        )
    relative = difference / max(proof.max_abs_logit, 1e-30)
    if plan.guarantee == "arithmetic" and proof.dtype == "float32" and not relative <= _ARITHMETIC_TOLERANCE:
        raise ProofError(
            f"the plan guarantees equality up to rounding, but the models differ {where}: logits by {relative:.1e}"
            " relative: the written model is not what was planned, grow it again"
        )


def _run_layers(
    base: Checkpoint, grown: Checkpoint, plan: Plan, tokens_BT: np.ndarray, on_layer: Callable[[], object]
) -> tuple[jax.Array, jax.Array, int | None, list[Change]]:
    config = base.config
    x_base, x_grown = embed(base, tokens_BT), embed(grown, tokens_BT)
    # Experts are another program than the feed-forward they replace, so nothing is shared from the first layer on.
    parted_at = None if plan.experts is None and same_bits(x_base, x_grown) else 0
    changes = []
    next_base = 0
    for number, row in enumerate(plan.rows):
        params = read_layer(grown, number)
        y = run_layer(grown.config, params, x_grown)
        if row.injected:
            changes.append(Change(number, *map(float, _change(x_grown, y))))
        if parted_at is None:
            if row.is_base_layer and row.sources[0][0] == next_base:
                is_same_layer = _has_params(base, next_base, params)
                x_base = y if is_same_layer else run_layer(config, read_layer(base, next_base), x_base)
                next_base += 1
            if not same_bits(x_base, y):
                parted_at = number
        # Wait, and free the layer, before the next one is read: layers must not queue up in memory.
        x_grown = y.block_until_ready()
        del params
        on_layer()
    for layer in range(next_base, config.num_hidden_layers):
        x_base = run_layer(config, read_layer(base, layer), x_base).block_until_ready()
        on_layer()
    return x_base, x_grown, parted_at, changes


def _has_params(checkpoint: Checkpoint, layer: int, params: dict[str, Any]) -> bool:
    """Whether a layer on disk has the same bytes as params in memory. Reads through a small buffer."""

    def is_same(name: str) -> bool:
        content, at = np.asarray(pick(params, name)).reshape(-1).view(np.uint8), 0
        for tensor in checkpoint.stack(name, [layer]).tensors:
            for chunk in read_chunks(tensor):
                if not np.array_equal(content[at : at + len(chunk)], chunk):
                    return False
                at += len(chunk)
        return True

    return all(is_same(name) for name in checkpoint.config.layer_tensors)


@jax.jit
def _change(x_BTD: jax.Array, y_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)
    norm_x, norm_y = jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(y, axis=-1)
    relative = jnp.linalg.norm(y - x, axis=-1) / norm_x
    return relative.mean(), ((x * y).sum(-1) / (norm_x * norm_y)).mean()
