"""Layer-stacked params written back as a Hugging Face folder, a tensor at a time."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tli_jax.errors import UsageError
from tli_jax.growth.plan import Plan
from tli_jax.hf import sidecar
from tli_jax.hf.checkpoint import hf_name
from tli_jax.hf.grown_config import grow_config
from tli_jax.hf.headers import CODES
from tli_jax.hf.output import check_output, staged
from tli_jax.hf.stream import Piece, parse_size, split_shards, write_safetensors
from tli_jax.models.config import LlamaConfig
from tli_jax.models.tree import pick


def save_hf(
    path: Path | str,
    config: LlamaConfig,
    params: dict[str, Any],
    *,
    plan: Plan | None = None,
    source: Path | str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write params as a folder that any Llama loader opens, whole or not at all. One tensor is on the host at a time.

    Args:
        path: folder to write; must not exist, or be empty, unless ``overwrite``, which replaces a model folder only.
        config: of the model, or of the base where that differs in depth alone: the depth is that of the params. For
            params with experts ``tli_jax.grown_config`` makes it.
        params: layer-stacked, as ``load_hf`` and ``inject`` give them; dtypes are kept.
        plan: how the params were grown; written as ``growth.json``.
        source: folder of the base, whose tokenizer, generation, licence and notice files are taken along.
        max_shard_size: largest safetensors file, e.g. ``"5GB"``.

    Raises:
        UsageError: a dtype that is not supported, or params that do not fit the plan.
        OutputError, StorageError: the folder cannot be written.
    """
    path = Path(path)
    pieces = [_piece(name, array) for name, array in unstack(config, params)]
    depth = _depth(params)
    if plan is not None and len(plan) != depth:
        raise UsageError(f"the plan gives {len(plan)} layers, the params have {depth}: inject first")
    check_output(path, None if source is None else Path(source), overwrite)
    with staged(path, sum(piece.nbytes for piece in pieces), overwrite=overwrite) as partial:
        write_safetensors(partial, split_shards(pieces, parse_size(max_shard_size)), {}, lambda _: None)
        raw = config.with_layers(depth).to_hf()
        if plan is not None:
            # Params that have experts come with the configuration of those.
            raw = grow_config(raw, config, dataclasses.replace(plan, experts=None))
        sidecar.write_json(partial / "config.json", raw)
        if plan is not None:
            sidecar.write_json(partial / "growth.json", plan.to_json() | {"digests": None, "proof": None})
        if source is not None:
            sidecar.copy_allowed(Path(source), partial)


def unstack(config: LlamaConfig, params: dict[str, Any]) -> Iterator[tuple[str, functools.partial[Any]]]:
    """Hugging Face name of every tensor, and a call that gives it; layer by layer, as deep as the params are."""
    first, *rest = config.outer_tensors
    yield hf_name(first), functools.partial(pick, params, first)
    for layer in range(_depth(params)):
        for name, dims in config.layer_tensors.items():
            for expert, stored in enumerate(config.stored_tensors(name)):
                at = (layer, expert) if len(dims) == 3 else (layer,)
                yield hf_name(stored, layer), functools.partial(lambda n, at: pick(params, f"layers.{n}")[at], name, at)
    yield from ((hf_name(name), functools.partial(pick, params, name)) for name in rest)


def _depth(params: dict[str, Any]) -> int:
    return len(pick(params, "layers.input_layernorm.weight"))


def _piece(name: str, get: functools.partial[Any]) -> Piece:
    like = get()
    code = CODES.get(np.dtype(like.dtype))
    if code is None:
        raise UsageError(f"{name}: dtype {like.dtype} cannot be written, use one of float32, bfloat16, float16")

    def make() -> Iterator[memoryview]:
        yield np.ascontiguousarray(get()).reshape(-1).view(np.uint8).data

    return Piece(name, code, tuple(like.shape), like.nbytes, make=make)
