"""A small model, cut up for training in every way that the tests need."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from tli_jax.cli.config import TrainConfig
from tli_jax.distributed.mesh import make_mesh, param_sharding
from tli_jax.models.attention import causal
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import Params, init_params
from tli_jax.training.freezing import Arrays, group, make_layout
from tli_jax.training.trainer import Trainer


@pytest.fixture(scope="session")
def model() -> LlamaConfig:
    """Eight layers; no two sizes are equal, so that no dim can pass for another."""
    return LlamaConfig(
        vocab_size=72,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
    )


@pytest.fixture(scope="session")
def params(model: LlamaConfig) -> Params:
    return init_params(model, jax.random.key(0))


@pytest.fixture(scope="session")
def injected() -> tuple[bool, ...]:
    """Three like periods on two layers below, which nothing is ever differentiated through."""
    return tuple(i in (2, 4, 6) for i in range(8))


@pytest.fixture(scope="session")
def start(model: LlamaConfig, params: Params, injected: Sequence[bool]) -> Any:
    """A trainer with the options given, what trains and what does not; on one device unless told otherwise."""

    def make(mesh: dict[str, int] | None = None, **options: Any) -> tuple[Trainer, Arrays, Arrays]:
        config = TrainConfig(**{"dtypes": {"compute": "float32"}, "mesh": mesh or {}} | options)
        devices = jax.devices()[:1] if mesh is None else jax.devices()
        layout = make_layout(model, injected, config.only, config.outer)
        trainer = Trainer(model, config, layout, make_mesh(config.mesh, devices), causal)
        dims = {leaf.name: leaf.dims for leaf in trainer.param_specs}
        parts = [
            {name: jax.device_put(np.asarray(x), param_sharding(trainer.mesh, dims[name])) for name, x in part.items()}
            for part in group(params, trainer.param_specs)
        ]
        return trainer, parts[0], parts[1]

    return make


@pytest.fixture(scope="session")
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments, ``[1, 8, 17]``: two documents in some rows."""
    tokens = np.random.default_rng(1).integers(0, 72, (1, 8, 17)).astype(np.int32)
    segments = np.zeros_like(tokens)
    segments[:, ::2, 9:] = 1
    return tokens, segments
