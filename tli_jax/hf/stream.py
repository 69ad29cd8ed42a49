"""Growth from file to file: kept tensors are copied by the kernel, injected ones made a tensor at a time.

Memory does not grow with the model: bytes pass through small buffers; an initialiser that computes holds one tensor.
"""

import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import reprlib
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tli_jax.errors import DataError, UsageError
from tli_jax.growth.experts import MATRICES, Experts
from tli_jax.growth.plan import Plan
from tli_jax.growth.rows import HOST_INITS, is_residual_output
from tli_jax.hf.checkpoint import CHUNK, Checkpoint, hf_name, read_chunks, read_tensor, widest
from tli_jax.hf.grown_config import grown_config
from tli_jax.hf.headers import CODES, DTYPES, INDEX, SINGLE, Tensor

Progress = Callable[[int], None]
# Of a model and of one file: an index and a header of that many names can still be read back (``MAX_HEADER``).
MAX_TENSORS, _MAX_FILE_TENSORS = 35_000, 20_000
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Exponent bits, all set in NaN and Inf, and the unsigned type to look at them through.
_EXPONENTS = {"F32": (np.uint32, 0x7F800000), "BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00)}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor to write: bytes that lie in a file already, or that ``make`` yields chunk by chunk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    kept: Tensor | None = None
    make: Callable[[], Iterator[Any]] | None = None

    def chunks(self) -> Iterator[Any]:
        """Its bytes in order; a chunk may be overwritten by the next."""
        if self.kept is not None:
            return read_chunks(self.kept)
        assert self.make is not None
        return self.make()


def parse_size(text: str) -> int:
    """Bytes of a size like ``5GB`` or ``500MiB``.

    Raises:
        UsageError: it is not one.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?I?B?)", text.strip().upper())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise UsageError(f"max_shard_size {reprlib.repr(text)} is not a size like 5GB or 500MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def check_tensors(tensors: Iterable[Tensor], progress: Progress) -> tuple[dict[str, str], dict[str, int]]:
    """One pass over the base: sha256 of each tensor's bytes, and how many of its values are NaN or Inf.

    Returns:
        ``(digests, nonfinite)``, by tensor name; ``nonfinite`` names only tensors that have some.
    """

    def check(tensor: Tensor) -> tuple[str, str, int]:
        digest, count = hashlib.sha256(), 0
        unsigned, exponent = _EXPONENTS[tensor.dtype]
        for chunk in read_chunks(tensor):
            digest.update(chunk)
            values = np.frombuffer(chunk, unsigned) & unsigned(exponent)
            # The maximum is several times cheaper than a count, which is only needed when something is wrong.
            if values.max() == exponent:
                count += int(np.count_nonzero(values == exponent))
            progress(len(chunk))
        return tensor.name, digest.hexdigest(), count

    tensors = sorted(tensors, key=lambda tensor: -tensor.nbytes)
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results = list(pool.map(check, tensors))
    return {name: digest for name, digest, _ in results}, {name: count for name, _, count in results if count}


def grown_pieces(base: Checkpoint, plan: Plan, facts: dict[str, Any] | None = None) -> list[Piece]:
    """Every tensor of the grown model, in the order in which it is written, and how it comes about.

    Args:
        facts: filled, as pieces are made, by what initialisers find that work on the host.

    A tensor keeps its dtype; one made of several that differ in theirs is float32, as in memory.

    Raises:
        UsageError: the plan is not for such a base, or makes more tensors than a folder can hold.
    """
    tensors = base.tensors
    grown = grown_config(base.config, plan)  # refuses experts of what has some
    count = len(plan) * sum(grown.num_experts if len(dims) == 3 else 1 for dims in grown.layer_tensors.values())
    if count > MAX_TENSORS:
        raise UsageError(
            f"{plan.method}: {count:,} tensors are more than the {MAX_TENSORS:,} that can be written: ask for less"
        )
    if base.config.num_experts and any(row.init in HOST_INITS for row in plan.rows):
        raise UsageError(f"{plan.method}: init transport and predictor make dense layers, the base has experts")
    pieces = [_keep(tensors["model.embed_tokens.weight"], "model.embed_tokens.weight")]
    on_host = _OnHost(base, plan, {} if facts is None else facts)
    layer_tensors = [(name, part) for name in base.config.layer_tensors for part in base.config.stored_tensors(name)]
    order = [(number, *names) for number in range(len(plan)) for names in layer_tensors]
    if plan.is_by_kind:
        order = [(number, *names) for names in layer_tensors for number in range(len(plan))]
    for number, name, part in order:
        row, is_output = plan.rows[number], is_residual_output(name)
        sources = [tensors[hf_name(part, layer)] for layer, _ in row.sources]
        target = hf_name(part, number)
        action = row.action(is_output)
        if action == "copy":
            piece = _keep(sources[0], target)
        else:
            if action == "compute" and row.init in HOST_INITS:
                make = on_host.maker(number, name, is_output, widest(sources))
            else:
                maker = {"zero": _zeros, "combine": _combined, "compute": _computed}[action]
                # An expert's tensor is drawn by its own name.
                expert = "" if part == name else f".{base.config.stored_tensors(name).index(part)}"
                make = maker(plan, number, name + expert, sources, is_output)
            dtype, shape = widest(sources), sources[0].shape
            piece = Piece(target, CODES[dtype], shape, math.prod(shape) * dtype.itemsize, make=make)
        if plan.experts is not None and name.startswith("mlp."):
            pieces += _expert_pieces(plan.experts, number, name.split(".")[1], piece)
        else:
            pieces.append(piece)
    pieces += [_keep(tensors[hf_name(n)], hf_name(n)) for n in base.config.outer_tensors if n != "embed_tokens.weight"]
    return pieces


def _expert_pieces(experts: Experts, number: int, name: str, dense: Piece) -> Iterator[Piece]:
    """What comes of one matrix of a dense feed-forward; with the first of them the router."""
    shape = list(dense.shape)
    shape[name == "down_proj"] = experts.expert_size(shape[name == "down_proj"])  # F, the last dim of down alone
    dtype = DTYPES[dense.dtype]
    prefix = f"model.layers.{number}.block_sparse_moe"

    def router() -> Iterator[Any]:
        from tli_jax.growth.upcycle import make_router

        yield np.asarray(make_router(experts, dense.shape[1], dtype, number)).reshape(-1).view(np.uint8).data

    def expert_maker(expert: int) -> Callable[[], Iterator[Any]]:
        def make() -> Iterator[Any]:
            from tli_jax.growth.upcycle import make_expert

            whole = np.frombuffer(b"".join(map(bytes, dense.chunks())), dtype).reshape(dense.shape)
            made = np.asarray(make_expert(experts, name, whole, number, expert))
            yield np.ascontiguousarray(made).reshape(-1).view(np.uint8).data

        return make

    if name == "gate_proj":
        router_shape = (experts.total, dense.shape[1])
        nbytes = router_shape[0] * router_shape[1] * dtype.itemsize
        yield Piece(f"{prefix}.gate.weight", dense.dtype, router_shape, nbytes, make=router)
    for expert in range(experts.total):
        target = f"{prefix}.experts.{expert}.{MATRICES[name]}.weight"
        if experts.upcycle == "copy":
            yield dataclasses.replace(dense, name=target)
        else:
            nbytes = dense.nbytes // experts.granularity
            yield Piece(target, dense.dtype, tuple(shape), nbytes, make=expert_maker(expert))


def _keep(tensor: Tensor, name: str) -> Piece:
    return Piece(name, tensor.dtype, tensor.shape, tensor.nbytes, kept=tensor)


def _zeros(plan: Plan, number: int, name: str, sources: list[Tensor], is_output: bool) -> Callable[[], Iterator[Any]]:
    nbytes = math.prod(sources[0].shape) * widest(sources).itemsize

    def make() -> Iterator[Any]:
        chunk = bytes(min(CHUNK, nbytes))
        for start in range(0, nbytes, CHUNK):
            yield memoryview(chunk)[: min(CHUNK, nbytes - start)]

    return make


def _combined(
    plan: Plan, number: int, name: str, sources: list[Tensor], is_output: bool
) -> Callable[[], Iterator[Any]]:
    row = plan.rows[number]
    weights = [np.float32(weight) for _, weight in row.sources]

    def make() -> Iterator[Any]:
        # Here, because it brings JAX, which a plan alone does not need.
        from tli_jax.growth.initialisers import combine

        # As many elements of each at a time.
        sizes = [CHUNK // 4 * DTYPES[source.dtype].itemsize for source in sources]
        for chunks in zip(*map(read_chunks, sources, sizes), strict=True):
            arrays = [np.frombuffer(c, DTYPES[s.dtype]) for c, s in zip(chunks, sources, strict=True)]
            if len({array.dtype for array in arrays}) > 1:
                arrays = [array.astype(np.float32) for array in arrays]
            yield memoryview(combine(arrays, weights, np.float32(row.factor(is_output))).view(np.uint8))

    return make


def _computed(
    plan: Plan, number: int, name: str, sources: list[Tensor], is_output: bool
) -> Callable[[], Iterator[Any]]:
    row = plan.rows[number]

    def make() -> Iterator[Any]:
        from tli_jax.growth.initialisers import compute

        source = read_tensor(sources[0])
        made = compute(row.init, source, number, name, row.factor(is_output), plan.options)
        yield np.asarray(made).reshape(-1).view(np.uint8).data

    return make


class _OnHost:
    """Initialisers that read layers as they need them, and remember some of what they found."""

    def __init__(self, base: Checkpoint, plan: Plan, facts: dict[str, Any]):
        self.base, self.plan, self.facts = base, plan, facts
        self._hosts: Any = None

    def maker(self, number: int, name: str, is_output: bool, dtype: np.dtype) -> Callable[[], Iterator[Any]]:
        def make() -> Iterator[Any]:
            from tli_jax.growth.initialisers import HostInits

            if self._hosts is None:
                read = lambda layer, name: read_tensor(self.base.tensors[hf_name(name, layer)])  # noqa: E731
                self._hosts = HostInits(self.plan, read)
            tensor = np.ascontiguousarray(self._hosts.tensor(number, name, is_output, dtype))
            self.facts.update(self._hosts.facts)
            yield tensor.reshape(-1).view(np.uint8).data

        return make


def split_shards(pieces: list[Piece], max_shard_bytes: int) -> dict[str, list[Piece]]:
    """File name → pieces, in order. A shard closes before it outgrows the limit; a larger tensor has one alone."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        is_full = size + piece.nbytes > max_shard_bytes or len(shards[-1]) == _MAX_FILE_TENSORS
        if shards[-1] and is_full:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def write_safetensors(
    folder: Path, shards: dict[str, list[Piece]], digests: dict[str, str], progress: Progress
) -> tuple[dict[str, str], float]:
    """Write the shards, synced, and an index where there is more than one.

    Args:
        digests: sha256 of kept tensors, by their name in the file they come from; reused, so kept bytes are not read
            here at all.
        progress: told of the bytes as they are written.

    Returns:
        sha256 of every tensor written, by name, and the seconds that hashing new tensors took.
    """
    written: dict[str, str] = {}
    hashing = 0.0
    for name, shard in shards.items():
        with (folder / name).open("wb", buffering=0) as out:
            out.write(_header(shard))
            for piece in shard:
                if piece.kept is not None:
                    _copy(piece.kept, out, progress)
                    written[piece.name] = digests[piece.kept.name]
                    continue
                digest = hashlib.sha256()
                for chunk in piece.chunks():
                    _write_all(out, chunk)
                    started = time.perf_counter()
                    digest.update(chunk)
                    hashing += time.perf_counter() - started
                    progress(len(chunk))
                written[piece.name] = digest.hexdigest()
            os.fsync(out.fileno())
    if len(shards) > 1:
        weight_map = {piece.name: name for name, shard in shards.items() for piece in shard}
        size = sum(piece.nbytes for shard in shards.values() for piece in shard)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return written, hashing


def _header(pieces: list[Piece]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in pieces:
        entries[piece.name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [at, at + piece.nbytes],
        }
        at += piece.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _copy(tensor: Tensor, out: Any, progress: Progress) -> None:
    """Let the kernel copy a range of bytes, or share it where it can; by read and write where it cannot copy."""
    with tensor.file.open("rb", buffering=0) as source:
        at, end = tensor.start, tensor.start + tensor.nbytes
        while at < end:
            try:
                count = os.copy_file_range(source.fileno(), out.fileno(), min(end - at, 2**28), offset_src=at)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                break
            if count == 0:
                raise DataError(
                    f"{tensor.file}: ends within tensor {tensor.name!r}: the file was cut while it was read"
                )
            at += count
            progress(count)
    if at < end:
        for chunk in read_chunks(dataclasses.replace(tensor, start=at, nbytes=end - at)):
            _write_all(out, chunk)
            progress(len(chunk))


def _write_all(out: Any, chunk: Any) -> None:
    view = memoryview(chunk).cast("B")
    while view:
        view = view[out.write(view) :]
