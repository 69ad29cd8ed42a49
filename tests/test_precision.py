"""Products of float32 arrays are float32 on every backend: no compiled function leaves their precision to the backend.

By default, GPUs multiply float32 in TF32 and TPUs in bfloat16, which a CPU cannot show. The programs can. Not here:
Muon's iterations, which optax leaves to the backend.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tli_jax
from tli_jax.distributed.processes import flag_array
from tli_jax.growth import predictor
from tli_jax.verify import importance, logits
from tli_jax.verify.layers import run_layer

CONFIG = tli_jax.LlamaConfig(64, 32, 48, 2, 4, 2, 8)
EXPERTS = dataclasses.replace(CONFIG, num_experts=4, experts_per_token=2)
TOKENS = np.zeros((2, 16), np.int32)


def params(config, dtype="float32"):
    return tli_jax.init_params(dataclasses.replace(config, dtype=dtype), jax.random.key(0))


def mean_loss(config, params):
    return tli_jax.losses(config, params, TOKENS).mean()


def train_step(config, dtype, **options):
    """The compiled function of a trainer, given shapes only."""
    options = {"dtypes": {"compute": dtype}, "batch_size": 8, "sequence_length": 16, "remat": "full"} | options
    trainer = tli_jax.Trainer.create(dataclasses.replace(config, max_position_embeddings=4096), **options)
    state, stop = trainer.abstract_state(), flag_array(trainer.mesh, False)
    shape = (1, 8, options["sequence_length"] + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=trainer.batch_sharding)
    return trainer.step.lower(state, {}, tokens, tokens, stop)


def lowered(name, dtype):
    x_BTD, x_TD, eps = jnp.zeros((2, 16, 32)), jnp.zeros((16, 32)), CONFIG.rms_norm_eps
    layer = jax.tree.map(lambda leaf: leaf[0], params(CONFIG, dtype)["layers"])
    network = predictor.initial_network(8, (0, 0))
    return {
        "forward": lambda: jax.jit(tli_jax.forward, static_argnums=0).lower(CONFIG, params(CONFIG, dtype), TOKENS),
        "experts": lambda: jax.jit(tli_jax.forward, static_argnums=0).lower(EXPERTS, params(EXPERTS, dtype), TOKENS),
        "train step": lambda: train_step(CONFIG, dtype),
        "train step, long": lambda: train_step(CONFIG, dtype, sequence_length=2048),
        "train step, experts": lambda: train_step(EXPERTS, dtype),
        "gradient": lambda: jax.jit(jax.grad(mean_loss, 1), static_argnums=0).lower(CONFIG, params(CONFIG, dtype)),
        "one layer": lambda: run_layer.lower(CONFIG, layer, x_BTD.astype(dtype)),
        "logits of the proof": lambda: logits._logits.lower(x_TD, jnp.zeros((64, 32), dtype)),
        "importance, head": lambda: importance._head_gradient.lower(
            eps, x_TD[0], jnp.zeros((64, 32), dtype), x_BTD, TOKENS
        ),
        "importance, layer": lambda: importance._layer_importance.lower(
            CONFIG, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), layer), x_BTD, x_BTD
        ),
        "predictor": lambda: jax.jit(jax.grad(predictor._loss)).lower(network, jnp.zeros((4, 16)), jnp.zeros((4, 8))),
    }[name]()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [
        *("forward", "experts", "gradient", "one layer"),
        *("train step", "train step, long", "train step, experts"),
        *("logits of the proof", "importance, head", "importance, layer", "predictor"),
    ],
)
def test_float32_products_are_float32(name, dtype):
    products = [line for line in lowered(name, dtype).as_text().splitlines() if "dot_general" in line]
    assert products
    for line in products:
        if re.search(r"\(tensor<\w+xf32>, tensor<\w+xf32>\)", line):
            assert "precision = [HIGHEST, HIGHEST]" in line, line
