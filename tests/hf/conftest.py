"""Small models on disk, and growth from folder to folder."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # adds bfloat16 to numpy
import numpy as np
import pytest
from safetensors.numpy import save_file

from tli_jax.growth.plan import Plan
from tli_jax.hf import sidecar
from tli_jax.hf.checkpoint import expected_shapes, open_checkpoint
from tli_jax.hf.grown_config import grow_config
from tli_jax.hf.grown_tensors import grown_tensors
from tli_jax.hf.headers import read_folder
from tli_jax.hf.shards import parse_size, split_shards, write_shards
from tli_jax.hf.tensors import check_tensors
from tli_jax.models.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Growth:
    """The result of ``grow``: the folder, sha256 of every tensor of both models, and counts of NaN and Inf."""

    folder: Path
    base_digests: dict[str, str]
    digests: dict[str, str]
    nonfinite: dict[str, int]
    bytes_written: int


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """Writes a small random Llama as a Hugging Face folder, with an index if ``shards`` > 1."""

    def make(
        folder: Path,
        dtype: str = "float32",
        *,
        layers: int = 4,
        tied: bool = True,
        shards: int = 1,
        seed: int = 0,
        extra: dict[str, Any] | None = None,
    ) -> Path:
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 48,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": tied,
            "torch_dtype": dtype,
        } | (extra or {})
        shapes = expected_shapes(LlamaConfig.from_hf(config))
        rng = np.random.default_rng(seed)

        def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
            mean = 1.0 if "norm" in name else 0.0
            # Large enough for a damaged weight to change the logits.
            return rng.normal(mean, 0.2, shape).astype(np.float32).astype(np.dtype(dtype))

        tensors = {name: tensor(name, shape) for name, shape in shapes.items()}
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        names = list(tensors)
        files = {
            f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors": names[i::shards]
            for i in range(shards)
        }
        for file, shard in files.items():
            save_file({name: tensors[name] for name in shard}, folder / file, {"format": "pt"})
        if shards > 1:
            index = {"metadata": {}, "weight_map": {name: file for file, shard in files.items() for name in shard}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make


@pytest.fixture(scope="session")
def grow() -> Callable[..., Growth]:
    """Grows a folder without the command."""

    def grow(base: Path, plan: Plan, output: Path, max_shard: str = "5GB") -> Growth:
        checkpoint = open_checkpoint(base)
        base_digests, nonfinite = check_tensors(checkpoint.tensors.values(), lambda _: None)
        output.mkdir(parents=True)
        shards = split_shards(grown_tensors(checkpoint, plan), parse_size(max_shard))
        written: list[int] = []
        digests, _ = write_shards(output, shards, base_digests, written.append)
        sidecar.write_json(output / "config.json", grow_config(checkpoint.raw, checkpoint.config, plan))
        sidecar.copy_allowed(base, output)
        return Growth(output, base_digests, digests, nonfinite, sum(written))

    return grow


@pytest.fixture(scope="session")
def read_bytes() -> Callable[[Path], dict[str, bytes]]:
    """The bytes of every tensor of a folder, by Hugging Face name."""

    def read(folder: Path) -> dict[str, bytes]:
        files: dict[Path, bytes] = {}

        def content(file: Path) -> bytes:
            return files.setdefault(file, file.read_bytes() if file not in files else b"")

        return {name: content(t.file)[t.start : t.start + t.nbytes] for name, t in read_folder(folder)[0].items()}

    return read
