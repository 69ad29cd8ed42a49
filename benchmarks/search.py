"""Variants of initialisation and position that nobody has published, against ``identity`` and ``half``, by the rules of
``tli_jax.compare``: same base, size, tokens, schedule and seeds.

    python benchmarks/search.py --config configs/compare_embedded.yaml

The flags are those of ``tli_jax.compare``; ``methods`` are replaced. In the output of a comparison that was made with
the same settings, what that measured is not done again. Of n injected layers behind their sources:

- ``split-0.25``: residual outputs of the source times 0.75, of its copy times 0.25; ``half`` has 0.5 and 0.5.
- ``weakened``: the source times 0.5, the copy 0: what halving the source does, without what the copy gives.
- ``learnt``: factors of each source and copy learnt from ``half`` on, by Adam on BATCHES batches of the new text.
- ``next``: ``identity``, but a copy of the layer that follows instead of the one before.
- ``half-redundant``: ``half``, behind those n layers that change the hidden state least; not with K = 1.
"""

import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tli_jax import train
from tli_jax.cli.config import CompareConfig
from tli_jax.cli.console import console
from tli_jax.cli.frame import run_command
from tli_jax.cli.parse import parse
from tli_jax.comparison.run import compare
from tli_jax.growth.inject import inject
from tli_jax.growth.methods import tli
from tli_jax.hf import hub, tokens
from tli_jax.hf.load import load_hf
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import Llama, make_rope
from tli_jax.models.loss import token_losses
from tli_jax.reporting import comparison

BATCHES, RATE = 32, 0.02


def spec(layers: int, factors: dict[int, tuple[float, float]]) -> str:
    """For ``custom``: each base layer, behind those in ``factors`` a copy, and the outputs of both by those factors."""
    parts = []
    for layer in range(layers):
        parts += [f"{layer}*{f:.3f}{mark}" for f, mark in zip(factors.get(layer, (1.0,)), "ki", strict=False)]
    return ",".join(parts)


def changes(config: LlamaConfig, params: Any, tokens_BT: jax.Array) -> list[float]:
    """By how much each layer changes the hidden state, relative to its size, mean over tokens."""
    model = Llama(config, params)
    x = model.embed_tokens.weight[...][tokens_BT]
    rope = make_rope(config, tokens_BT.shape[1], x.dtype)

    def layer(x: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
        y = block(x, rope)[0]
        return y, (jnp.linalg.norm(y - x, axis=-1) / jnp.linalg.norm(x, axis=-1)).mean()

    return jax.lax.scan(layer, x, model.layers)[1].tolist()


def learn_factors(
    config: LlamaConfig, params: Any, places: Sequence[int], batches: Any
) -> dict[int, tuple[float, float]]:
    """Of the outputs of each source and its copy, from a half on."""
    plan = tli(config.num_hidden_layers, init="copy", after=places)
    grown = inject(params, plan)
    sources = [i for i, row in enumerate(plan.rows[1:]) if row.injected]
    at = np.array([[i, i + 1] for i in sources])

    def loss(factors: jax.Array, batch: Any) -> jax.Array:
        scale = jnp.ones(len(plan)).at[at].set(factors)[:, None, None]
        layers = {**grown["layers"]}
        for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            layers[part] = layers[part] | {name: {"weight": layers[part][name]["weight"] * scale}}
        segments = jnp.asarray(batch.segments)
        model = Llama(config, grown | {"layers": layers})
        return token_losses(model, jnp.asarray(batch.tokens), None, segments)[0].mean()

    optimizer = optax.adam(RATE)
    factors = jnp.full(at.shape, 0.5)
    state = optimizer.init(factors)
    step = jax.jit(jax.value_and_grad(loss))
    for number in range(BATCHES):
        value, gradient = step(factors, next(batches))
        updates, state = optimizer.update(gradient, state)
        factors = optax.apply_updates(factors, updates)
        print(f"learnt {number}: {value:.4f}", file=sys.stderr)
    found = np.maximum(np.asarray(factors), 0).tolist()
    return {place: (a, b) for place, (a, b) in zip(sorted(places), found, strict=True)}


def variants(config: CompareConfig) -> list[dict[str, Any]]:
    model, params = load_hf(config.model, np.float32, revision=config.revision)
    folder = hub.resolve(config.model, config.revision)
    tokenizer, _ = tokens.open_tokenizer(folder, model)
    with tempfile.TemporaryDirectory() as cache:
        T = train.sequence_length(config, model)
        data = train.open_text(config, model, folder, tokenizer, T, Path(cache))
        batches = data.batches(0, config.batch_size, range(config.batch_size), config.seed)
        L = model.num_hidden_layers
        places = list(range(config.every - 1, L, config.every))
        moved = changes(model, params, jnp.asarray(next(batches).tokens))
        redundant = sorted(sorted(range(L), key=lambda layer: moved[layer])[: len(places)])
        learnt = learn_factors(model, params, places, batches)
    print(f"relative changes {np.round(moved, 3)}; learnt {learnt}", file=sys.stderr)
    behind = {place: place + 1 if place + 1 < L else place for place in places}
    following = ",".join(f"{i}k" + (f",{behind[i]}*0i" if i in behind else "") for i in range(L))
    specs = {"split-0.25": spec(L, dict.fromkeys(places, (0.75, 0.25)))}
    specs |= {"weakened": spec(L, dict.fromkeys(places, (0.5, 0.0))), "learnt": spec(L, learnt), "next": following}
    found: list[dict[str, Any]] = [{"method": "custom", "layers": text, "name": name} for name, text in specs.items()]
    if redundant != places:
        found.append({"method": "tli", "init": "half", "after": redundant, "name": "half-redundant"})
    return found


def main(arguments: Sequence[str]) -> None:
    config = parse(CompareConfig, "python benchmarks/search.py", __doc__ or "", arguments)
    known = ({"method": "tli", "init": "identity"}, {"method": "tli", "init": "half"})
    config = dataclasses.replace(config, methods=(*known, *variants(config)))
    results = compare(config, shlex.join(["python", "benchmarks/search.py", *arguments]))
    console().print(comparison.tabulate(results))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
