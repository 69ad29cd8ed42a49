"""The tensors of a grown model, each made from tensors on disk when it is written.

Memory does not grow with the model: bytes go through small buffers, and an initialiser that computes holds one tensor.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from tli_jax.errors import UsageError
from tli_jax.growth.experts import MATRICES, Experts
from tli_jax.growth.plan import Plan
from tli_jax.growth.rows import HOST_INITS, Row, is_residual_output
from tli_jax.hf.checkpoint import Checkpoint, hf_name
from tli_jax.hf.grown_config import grown_config
from tli_jax.hf.shards import MAX_TENSORS, OutputTensor, as_chunks
from tli_jax.hf.tensors import CHUNK, CODES, DTYPES, Tensor, common_dtype, read_chunks, read_tensor


def grown_tensors(base: Checkpoint, plan: Plan, facts: dict[str, Any] | None = None) -> list[OutputTensor]:
    """Every tensor of the grown model, in the order in which it is written.

    Copied tensors keep their dtype; one made from tensors of different dtypes is float32, as it is in memory.

    Args:
        facts: when tensors are made, initialisers that run on the host add their findings to it.

    Raises:
        UsageError: the plan does not fit the base, or makes more tensors than a folder can have.
    """
    grown = grown_config(base.config, plan)
    count = len(plan) * sum(grown.num_experts if len(dims) == 3 else 1 for dims in grown.layer_tensors.values())
    if count > MAX_TENSORS:
        raise UsageError(
            f"{plan.method}: the grown model has {count:,} tensors, the limit is {MAX_TENSORS:,}: ask for fewer layers"
            " or experts"
        )
    if base.config.num_experts and any(row.init in HOST_INITS for row in plan.rows):
        raise UsageError(f"{plan.method}: init transport and predictor make dense layers, the base has experts")
    maker = _Maker(base, plan, {} if facts is None else facts)
    parts = [(name, part) for name in base.config.layer_tensors for part in base.config.stored_tensors(name)]
    if plan.is_by_kind:
        order = [(number, *names) for names in parts for number in range(len(plan))]
    else:
        order = [(number, *names) for number in range(len(plan)) for names in parts]
    first, *rest = (OutputTensor.copied(base.tensors[hf_name(name)], hf_name(name)) for name in grown.outer_tensors)
    layers = (maker.layer_tensors(number, name, part) for number, name, part in order)
    return [first, *(tensor for tensors in layers for tensor in tensors), *rest]


class _Maker:
    def __init__(self, base: Checkpoint, plan: Plan, facts: dict[str, Any]):
        self.base, self.plan, self.facts = base, plan, facts

    def layer_tensors(self, number: int, name: str, part: str) -> Iterator[OutputTensor]:
        """A tensor of a grown layer, or the tensors of the experts that are made from it."""
        tensor = self._layer_tensor(number, name, part)
        if self.plan.experts is not None and name.startswith("mlp."):
            yield from _expert_tensors(self.plan.experts, number, name.split(".")[1], tensor)
        else:
            yield tensor

    def _layer_tensor(self, number: int, name: str, part: str) -> OutputTensor:
        row, is_output = self.plan.rows[number], is_residual_output(name)
        sources = [self.base.tensors[hf_name(part, layer)] for layer, _ in row.sources]
        action, dtype = row.action(is_output), common_dtype(sources)
        if action == "copy":
            return OutputTensor.copied(sources[0], hf_name(part, number))
        if action == "compute" and row.init in HOST_INITS:
            make = as_chunks(functools.partial(self._compute_on_host, number, name, is_output, dtype))
        elif action == "compute":
            # The random numbers of an expert's tensor depend on its own name.
            expert = "" if part == name else f".{self.base.config.stored_tensors(name).index(part)}"
            make = as_chunks(functools.partial(self._compute, number, name + expert, is_output, sources[0]))
        elif action == "combine":
            make = functools.partial(_combine, row, is_output, sources)
        else:
            make = functools.partial(_zeros, OutputTensor("", CODES[dtype], sources[0].shape).nbytes)
        return OutputTensor(hf_name(part, number), CODES[dtype], sources[0].shape, make=make)

    def _compute(self, number: int, name: str, is_output: bool, source: Tensor) -> Any:
        # Imported here because they import JAX, which a plan alone does not need; the same below.
        from tli_jax.growth.initialisers import compute

        row = self.plan.rows[number]
        return compute(row.init, read_tensor(source), number, name, row.factor(is_output), self.plan.options)

    @functools.cached_property
    def _hosts(self) -> Any:
        from tli_jax.growth.initialisers import HostInits

        return HostInits(self.plan, lambda layer, name: read_tensor(self.base.tensors[hf_name(name, layer)]))

    def _compute_on_host(self, number: int, name: str, is_output: bool, dtype: np.dtype) -> Any:
        tensor = self._hosts.tensor(number, name, is_output, dtype)
        self.facts.update(self._hosts.facts)
        return tensor


def _zeros(nbytes: int) -> Iterator[Any]:
    chunk = memoryview(bytes(min(CHUNK, nbytes)))
    for start in range(0, nbytes, CHUNK):
        yield chunk[: nbytes - start]


def _combine(row: Row, is_output: bool, sources: list[Tensor]) -> Iterator[Any]:
    from tli_jax.growth.initialisers import combine

    weights, scale = [np.float32(weight) for _, weight in row.sources], np.float32(row.factor(is_output))
    sizes = [CHUNK // 4 * DTYPES[source.dtype].itemsize for source in sources]  # the same number of elements of each
    for chunks in zip(*map(read_chunks, sources, sizes), strict=True):
        arrays = [np.frombuffer(c, DTYPES[s.dtype]) for c, s in zip(chunks, sources, strict=True)]
        if len({array.dtype for array in arrays}) > 1:
            arrays = [array.astype(np.float32) for array in arrays]
        yield memoryview(combine(arrays, weights, scale).view(np.uint8))


def _expert_tensors(experts: Experts, number: int, name: str, dense: OutputTensor) -> Iterator[OutputTensor]:
    """The tensors that one matrix of a dense feed-forward becomes; ``gate_proj`` also gives the router."""
    dtype, prefix = DTYPES[dense.dtype], f"model.layers.{number}.block_sparse_moe"
    shape = list(dense.shape)
    shape[name == "down_proj"] = experts.expert_size(shape[name == "down_proj"])  # F is the last dim of down_proj only

    def router() -> Any:
        from tli_jax.growth.upcycle import make_router

        return make_router(experts, dense.shape[1], dtype, number)

    def expert_matrix(expert: int) -> Any:
        from tli_jax.growth.upcycle import make_expert

        return make_expert(experts, name, dense.to_array(), number, expert)

    if name == "gate_proj":
        router_shape = (experts.total, dense.shape[1])
        yield OutputTensor(f"{prefix}.gate.weight", dense.dtype, router_shape, make=as_chunks(router))
    for expert in range(experts.total):
        target = f"{prefix}.experts.{expert}.{MATRICES[name]}.weight"
        if experts.upcycle == "copy":
            yield dataclasses.replace(dense, name=target)
        else:
            make = as_chunks(functools.partial(expert_matrix, expert))
            yield OutputTensor(target, dense.dtype, tuple(shape), make=make)
