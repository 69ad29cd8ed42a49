"""Test models, read without the package's own checkpoint code, so that neither hides a bug in the other."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import Params, init_params
from tli_jax.models.tree import nest


def stack_layers(tensors: Mapping[str, Any]) -> Params:
    """``model.layers.3.mlp.up_proj.weight`` and the like -> the layer-stacked tree."""
    outer: dict[str, Any] = {}
    layers: dict[str, dict[int, Any]] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("model.")
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            layers.setdefault(rest, {})[int(number)] = tensor
        else:
            outer[name] = tensor
    stacked = {f"layers.{n}": np.stack([rows[i] for i in range(len(rows))]) for n, rows in layers.items()}
    return nest(outer | stacked)


def random_params(config: LlamaConfig, seed: int = 0) -> Params:
    """Random params, including norms, from NumPy: nothing to compile."""
    rng = np.random.default_rng(seed)

    def sample(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        mean, std = (1.0, 0.3) if "norm" in jax.tree_util.keystr(path) else (0.0, config.initializer_range)
        return rng.normal(mean, std, leaf.shape).astype(np.float32)

    abstract = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(sample, abstract)


def read_folder(folder: Path) -> tuple[LlamaConfig, Params]:
    config = LlamaConfig.from_hf(json.loads((folder / "config.json").read_text()))
    return config, stack_layers(load_file(folder / "model.safetensors"))


@pytest.fixture(name="stack_layers", scope="session")
def _stack_layers() -> Callable[[Mapping[str, Any]], Params]:
    return stack_layers


@pytest.fixture(name="random_params", scope="session")
def _random_params() -> Callable[..., Params]:
    return random_params


@pytest.fixture(name="read_folder", scope="session")
def _read_folder() -> Callable[[Path], tuple[LlamaConfig, Params]]:
    return read_folder


@pytest.fixture(scope="session")
def stories260k(material: Path) -> tuple[LlamaConfig, Params]:
    return read_folder(material / "stories260k")


@pytest.fixture(scope="session")
def tokenizer(material: Path) -> Any:
    from transformers import AutoTokenizer

    # Tests split the texts into windows, so the tokenizer need not warn about their length.
    return AutoTokenizer.from_pretrained(material / "stories260k", model_max_length=10**9)
