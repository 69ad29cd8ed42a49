"""Save layer-stacked params as a Hugging Face folder, one tensor at a time."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tli_jax.errors import UsageError
from tli_jax.growth.plan import Plan
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import tensor_names
from tli_jax.hf.grown_config import grow_config
from tli_jax.hf.output import check_output
from tli_jax.hf.shards import OutputTensor, as_chunks, parse_size, split_shards
from tli_jax.hf.tensors import CODES
from tli_jax.hf.write import write_model
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
    """Save params as a folder that any Llama loader opens. It is written completely or not at all.

    Only one tensor at a time is copied to the host.

    Args:
        path: the folder to write. It must not exist, or be empty, unless ``overwrite`` is set.
        config: configuration of the model. The number of layers is taken from the params, so the base's configuration
            will do, except for params with experts: for those use ``tli_jax.grown_config``. If ``load_hf`` returned it,
            keys of ``config.json`` that ``LlamaConfig`` does not know are written too.
        params: layer-stacked, ``[L, …]``, as ``load_hf`` and ``inject`` return them. Dtypes are kept.
        plan: how the params were grown; written as ``growth.json``.
        source: the base model, as a folder, a hub id or ``"embedded"``. Its tokenizer, generation configuration,
            licence and notice files are copied.
        max_shard_size: largest safetensors file, such as ``"5GB"``.
        overwrite: replace an existing model folder, but no other folder.

    Raises:
        UsageError: a dtype cannot be written, or the params do not fit the plan.
        OutputError, StorageError: the folder cannot be written.

    Example::

        config, params = tli_jax.load_hf("embedded")
        plan = tli_jax.tli(config.num_hidden_layers, every=4)
        grown = tli_jax.inject(params, plan)
        tli_jax.save_hf("grown", config, grown, plan=plan, source="embedded")
    """
    path, source = Path(path), None if source is None else hub.resolve(source)
    depth = _depth(params)
    if plan is not None and len(plan) != depth:
        raise UsageError(f"the plan makes {len(plan)} layers, the params have {depth}: inject first")
    shards = split_shards(
        [_output_tensor(name, get) for name, get in unstack(config, params)], parse_size(max_shard_size)
    )
    check_output(path, source, overwrite)
    raw = config.with_layers(depth).to_hf()
    if plan is not None:
        # Params with experts come with a configuration that has them already.
        raw = grow_config(raw, config, dataclasses.replace(plan, experts=None))
    with write_model(path, shards, raw, source=source, overwrite=overwrite) as model:
        if plan is not None:
            model.write_record("growth.json", plan.to_json() | {"digests": None, "proof": None})


def unstack(config: LlamaConfig, params: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The Hugging Face name of every tensor with a function that returns it, layer by layer."""
    for stored, name, index in tensor_names(config, _depth(params)):
        yield stored, functools.partial(_pick, params, f"layers.{name}" if index else name, index)


def _pick(params: dict[str, Any], name: str, index: tuple[int, ...]) -> Any:
    return pick(params, name)[index] if index else pick(params, name)


def _depth(params: dict[str, Any]) -> int:
    return len(pick(params, "layers.input_layernorm.weight"))


def _output_tensor(name: str, get: Callable[[], Any]) -> OutputTensor:
    array = get()
    code = CODES.get(np.dtype(array.dtype))
    if code is None:
        raise UsageError(f"{name}: dtype {array.dtype} cannot be written, use float32, bfloat16 or float16")
    return OutputTensor(name, code, tuple(array.shape), make=as_chunks(get))
