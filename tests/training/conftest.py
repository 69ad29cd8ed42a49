"""A small model, and trainers for it with any mesh and any trainable layers."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from tli_jax.cli.train_config import TrainConfig
from tli_jax.distributed.mesh import make_mesh
from tli_jax.models.attention import causal
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import Params, init_params
from tli_jax.training.freezing import Arrays, make_layout
from tli_jax.training.trainer import Trainer


@pytest.fixture(scope="session")
def model() -> LlamaConfig:
    """Eight layers. No two sizes are equal, so that confusing two dims fails."""
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
    """Three equal periods above two frozen layers."""
    return tuple(i in (2, 4, 6) for i in range(8))


@pytest.fixture(scope="session")
def build(model: LlamaConfig, params: Params, injected: Sequence[bool]) -> Any:
    """Makes ``(trainer, trained, frozen)`` for a mesh (one device by default) and training options."""

    def make(mesh: dict[str, int] | None = None, **options: Any) -> tuple[Trainer, Arrays, Arrays]:
        config = TrainConfig(**{"dtypes": {"compute": "float32"}, "mesh": mesh or {}} | options)
        devices = jax.devices()[:1] if mesh is None else jax.devices()
        layout = make_layout(model, injected, config.only, config.outer)
        trainer = Trainer(model, config, layout, make_mesh(config.mesh, devices), causal)
        return trainer, *trainer.shard(params)

    return make


@pytest.fixture(scope="session")
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments, ``[1, 8, 17]``; every other row has two documents."""
    tokens = np.random.default_rng(1).integers(0, 72, (1, 8, 17)).astype(np.int32)
    segments = np.zeros_like(tokens)
    segments[:, ::2, 9:] = 1
    return tokens, segments
