"""Write safetensors files: copied tensors by the kernel, new ones through small buffers."""

import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import re
import reprlib
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tli_jax.errors import UsageError
from tli_jax.hf.headers import INDEX, SINGLE
from tli_jax.hf.tensors import DTYPES, Tensor, read_chunks, truncated

Progress = Callable[[int], object]
# Limits of a model and of one file: index and header can still be read back (``inputs.MAX_JSON``).
MAX_TENSORS, _MAX_FILE_TENSORS = 35_000, 20_000
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: a copy of a stored tensor, or bytes that ``make`` yields chunk by chunk.

    Attributes:
        dtype: the safetensors code, such as ``BF16``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    copy_of: Tensor | None = None
    make: Callable[[], Iterator[Any]] | None = None

    @classmethod
    def copied(cls, tensor: Tensor, name: str) -> "OutputTensor":
        return cls(name, tensor.dtype, tensor.shape, copy_of=tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def to_array(self) -> np.ndarray:
        out, at = np.empty(self.shape, DTYPES[self.dtype]), 0
        content = out.reshape(-1).view(np.uint8)
        for chunk in self.chunks():
            content[at : at + len(chunk)] = chunk
            at += len(chunk)
        return out

    def chunks(self) -> Iterator[Any]:
        """The bytes in order; each chunk may be overwritten by the next one."""
        if self.copy_of is not None:
            return read_chunks(self.copy_of)
        assert self.make is not None
        return self.make()


def as_chunks(make: Callable[[], Any]) -> Callable[[], Iterator[Any]]:
    """Turn a function that returns an array into one that yields its bytes."""

    def chunks() -> Iterator[Any]:
        yield np.ascontiguousarray(make()).reshape(-1).view(np.uint8).data

    return chunks


def parse_size(text: str) -> int:
    """Parse a size such as ``5GB`` (5·10⁹) or ``500MiB`` (500·2²⁰) into bytes.

    Raises:
        UsageError: the text is not a size.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?I?B?)", text.strip().upper())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise UsageError(f"max_shard_size {reprlib.repr(text)} is not a size like 5GB or 500MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def split_shards(tensors: list[OutputTensor], max_shard_bytes: int) -> dict[str, list[OutputTensor]]:
    """Assign tensors to files, in order: file name → tensors. Only a single tensor may exceed the limit."""
    return share_shards(tensors, max_shard_bytes, 1)[0]


def share_shards(
    tensors: list[OutputTensor], max_shard_bytes: int, writers: int
) -> list[dict[str, list[OutputTensor]]]:
    """The files of each of several writers, who get about the same number of tensors. See ``split_shards``."""
    ends = [len(tensors) * writer // writers for writer in range(writers + 1)]
    parts = [_split(tensors[start:end], max_shard_bytes) for start, end in itertools.pairwise(ends)]
    count = sum(map(len, parts))
    names = iter([SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)])
    return [{next(names): shard for shard in part} for part in parts]


def _split(tensors: list[OutputTensor], max_shard_bytes: int) -> list[list[OutputTensor]]:
    shards: list[list[OutputTensor]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > max_shard_bytes or len(shards[-1]) == _MAX_FILE_TENSORS:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_shards(
    folder: Path,
    shards: Mapping[str, list[OutputTensor]],
    copied_digests: Mapping[str, str],
    progress: Progress = lambda nbytes: None,
) -> tuple[dict[str, str], float]:
    """Write the shards, flush them to disk, and write the index if there are several.

    Args:
        copied_digests: sha256 of the copied tensors by their name in the file they come from, so that their bytes
            need not be read here.
        progress: called with the number of bytes written since the last call.

    Returns:
        The sha256 of every tensor by name, and the seconds spent on hashing new tensors.
    """
    written = write_files(folder, shards, copied_digests, progress)
    write_index(folder, shards)
    return written


def write_index(folder: Path, shards: Mapping[str, list[OutputTensor]]) -> None:
    """Write the index if there are several shards."""
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
        size = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_files(
    folder: Path,
    shards: Mapping[str, list[OutputTensor]],
    copied_digests: Mapping[str, str],
    progress: Progress = lambda nbytes: None,
) -> tuple[dict[str, str], float]:
    """``write_shards`` without the index."""
    digests: dict[str, str] = {}
    hashing = 0.0
    for name, shard in shards.items():
        with (folder / name).open("wb", buffering=0) as out:
            out.write(make_header(shard))
            for tensor in shard:
                if tensor.copy_of is not None:
                    _copy(tensor.copy_of, out, progress)
                    digests[tensor.name] = copied_digests[tensor.copy_of.name]
                    continue
                digest = hashlib.sha256()
                for chunk in tensor.chunks():
                    _write(chunk, out)
                    started = time.perf_counter()
                    digest.update(chunk)
                    hashing += time.perf_counter() - started
                    progress(len(chunk))
                digests[tensor.name] = digest.hexdigest()
            os.fsync(out.fileno())
    return digests, hashing


def make_header(tensors: list[OutputTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _copy(tensor: Tensor, out: Any, progress: Progress) -> None:
    """Copy a range of bytes in the kernel, which may share blocks; where it cannot, read and write them."""
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
                raise truncated(tensor)
            at += count
            progress(count)
    if at < end:
        for chunk in read_chunks(dataclasses.replace(tensor, start=at, nbytes=end - at)):
            _write(chunk, out)
            progress(len(chunk))


def _write(chunk: Any, out: Any) -> None:
    view = memoryview(chunk).cast("B")
    while view:
        view = view[out.write(view) :]
