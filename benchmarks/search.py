"""Compares unpublished variants of initialisation and position with ``identity`` and ``half``.

    python benchmarks/search.py --config configs/compare_embedded.yaml

Uses the rules of ``tli_jax.compare``: same base, size, tokens, schedule and seeds for all. The flags are those of
``tli_jax.compare``, except that ``methods`` is replaced. If the output already contains a comparison with the same
settings, its measurements are reused. Each variant injects n layers, each after its source layer:

- ``split-0.25``: residual outputs of the source times 0.75 and of its copy times 0.25 (``half`` uses 0.5 and 0.5).
- ``weakened``: the source times 0.5, the copy times 0: the effect of a weaker source without the copy's output.
- ``learnt``: factors of each source and copy, learnt from ``half`` with Adam on BATCHES batches of the new text.
- ``next``: like ``identity``, but with a copy of the next layer instead of the previous one.
- ``half-redundant``: like ``half``, after the n layers that change the hidden state least; not available for K = 1.
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

from tli_jax.cli.config import CompareConfig
from tli_jax.cli.console import console
from tli_jax.cli.frame import run_command
from tli_jax.cli.parse import parse
from tli_jax.comparison.run import compare
from tli_jax.growth.inject import inject
from tli_jax.growth.methods import tli
from tli_jax.hf import hub
from tli_jax.hf.load import load_hf
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.models.attention import make_rope
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import Llama
from tli_jax.models.loss import token_losses
from tli_jax.reporting import comparison
from tli_jax.training.text import open_text, sequence_length

BATCHES, RATE = 32, 0.02


def spec(layers: int, factors: dict[int, tuple[float, float]]) -> str:
    """``layers`` of ``custom``: each layer in ``factors`` is followed by a copy, and its factors scale both outputs."""
    parts = []
    for layer in range(layers):
        parts += [f"{layer}*{f:.3f}{mark}" for f, mark in zip(factors.get(layer, (1.0,)), "ki", strict=False)]
    return ",".join(parts)


def changes(config: LlamaConfig, params: Any, tokens_BT: jax.Array) -> list[float]:
    """Relative change of the hidden state by each layer, averaged over tokens."""
    model = Llama.from_params(config, params)
    x = model.embed_tokens.weight[...][tokens_BT]
    rope = make_rope(config, tokens_BT.shape[1], x.dtype)

    def layer(x: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
        y = block(x, rope=rope)[0]
        return y, (jnp.linalg.norm(y - x, axis=-1) / jnp.linalg.norm(x, axis=-1)).mean()

    return jax.lax.scan(layer, x, model.layers)[1].tolist()


def learn_factors(
    config: LlamaConfig, params: Any, positions: Sequence[int], batches: Any
) -> dict[int, tuple[float, float]]:
    """Learn output scales of each source and its copy, starting from 0.5."""
    plan = tli(config.num_hidden_layers, init="copy", after=positions)
    grown = inject(params, plan)
    sources = [i for i, row in enumerate(plan.rows[1:]) if row.injected]
    at = np.array([[i, i + 1] for i in sources])

    def loss(factors: jax.Array, batch: Any) -> jax.Array:
        scale = jnp.ones(len(plan)).at[at].set(factors)[:, None, None]
        layers = {**grown["layers"]}
        for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            layers[part] = layers[part] | {name: {"weight": layers[part][name]["weight"] * scale}}
        segments = jnp.asarray(batch.segments)
        model = Llama.from_params(config, grown | {"layers": layers})
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
    learnt = np.maximum(np.asarray(factors), 0).tolist()
    return {layer: (a, b) for layer, (a, b) in zip(sorted(positions), learnt, strict=True)}


def variants(config: CompareConfig) -> list[dict[str, Any]]:
    model, params = load_hf(config.model, np.float32, revision=config.revision)
    folder = hub.resolve(config.model, config.revision)
    tokenizer, _ = open_tokenizer(folder, model)
    with tempfile.TemporaryDirectory() as cache:
        T = sequence_length(config, model)
        data = open_text(config, model, folder, tokenizer, T, Path(cache))
        batches = data.batches(0, config.batch_size, range(config.batch_size), config.seed)
        L = model.num_hidden_layers
        positions = list(range(config.every - 1, L, config.every))
        change = changes(model, params, jnp.asarray(next(batches).tokens))
        redundant = sorted(sorted(range(L), key=lambda layer: change[layer])[: len(positions)])
        learnt = learn_factors(model, params, positions, batches)
    print(f"relative changes {np.round(change, 3)}; learnt {learnt}", file=sys.stderr)
    next_layer = {layer: min(layer + 1, L - 1) for layer in positions}
    next_specs = ",".join(f"{i}k" + (f",{next_layer[i]}*0i" if i in next_layer else "") for i in range(L))
    specs = {"split-0.25": spec(L, dict.fromkeys(positions, (0.75, 0.25)))}
    specs |= {"weakened": spec(L, dict.fromkeys(positions, (0.5, 0.0))), "learnt": spec(L, learnt), "next": next_specs}
    contenders: list[dict[str, Any]] = [
        {"method": "custom", "layers": text, "name": name} for name, text in specs.items()
    ]
    if redundant != positions:
        contenders.append({"method": "tli", "init": "half", "after": redundant, "name": "half-redundant"})
    return contenders


def main(arguments: Sequence[str]) -> None:
    config = parse(CompareConfig, "python benchmarks/search.py", __doc__ or "", arguments)
    baselines = ({"method": "tli", "init": "identity"}, {"method": "tli", "init": "half"})
    config = dataclasses.replace(config, methods=(*baselines, *variants(config)))
    results = compare(config, shlex.join(["python", "benchmarks/search.py", *arguments]))
    for table in comparison.make_tables(results):
        table.render(console())


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
