"""One tensor in a safetensors file: where its bytes are, and how they are read."""

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from tli_jax.errors import DataError

CHUNK = 4 * 2**20  # bytes in memory at a time
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# The exponent bits, all set in NaN and Inf, and the unsigned type to read them with.
_EXPONENTS = {"F32": (np.uint32, 0x7F800000), "BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00)}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The location of one tensor: ``dtype`` is a safetensors code such as ``BF16``, ``start`` a byte in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def common_dtype(tensors: Sequence[Tensor]) -> np.dtype:
    """The dtype of the tensors if they have the same one, else float32, which holds the values of all."""
    codes = {tensor.dtype for tensor in tensors}
    return DTYPES[codes.pop() if len(codes) == 1 else "F32"]


def read_chunks(tensor: Tensor, size: int = CHUNK) -> Iterator[memoryview]:
    """The bytes of a tensor in order. All chunks share one buffer: each overwrites the previous one.

    The file is not memory-mapped: if it were truncated meanwhile, the process would be killed. Here that is a
    ``DataError``.
    """
    buffer = memoryview(bytearray(min(size, tensor.nbytes)))
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        left = tensor.nbytes
        while left:
            wanted, count = min(size, left), 0
            while count < wanted:  # a short read would split an element
                if not (more := stream.readinto(buffer[count:wanted])):
                    raise truncated(tensor)
                count += more
            left -= count
            yield buffer[:count]


def truncated(tensor: Tensor) -> DataError:
    return DataError(f"{tensor.file}: ends within tensor {tensor.name!r}: the file was truncated while it was read")


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal byte for byte."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(x == y for x, y in zip(read_chunks(a), read_chunks(b), strict=True))


def read_tensor(tensor: Tensor, rows: slice = slice(None)) -> np.ndarray:
    """A tensor, or a range of its leading rows, in its stored dtype."""
    first, last, _ = rows.indices(tensor.shape[0])
    out = np.empty((last - first, *tensor.shape[1:]), DTYPES[tensor.dtype])
    read_rows(tensor, first, out)
    return out


def read_rows(tensor: Tensor, first: int, out: np.ndarray) -> None:
    """Read the leading rows from ``first`` on into ``out``, which is contiguous, and cast them to its dtype."""
    stored = out if out.dtype == DTYPES[tensor.dtype] else np.empty(out.shape, DTYPES[tensor.dtype])
    left = stored.reshape(-1).view(np.uint8).data
    at = tensor.start + first * (tensor.nbytes // tensor.shape[0])
    with tensor.file.open("rb", buffering=0) as stream:
        while left:
            if not (count := os.preadv(stream.fileno(), [left], at)):
                raise truncated(tensor)
            left, at = left[count:], at + count
    if stored is not out:
        out[...] = stored


def check_tensors(
    tensors: Iterable[Tensor], progress: Callable[[int], object]
) -> tuple[dict[str, str], dict[str, int]]:
    """Read every tensor once: compute its sha256 and count its NaN and Inf values.

    Args:
        progress: called with the number of bytes read since the last call, from several threads.

    Returns:
        ``(digests, nonfinite)`` by tensor name; ``nonfinite`` has only the tensors with NaN or Inf.
    """

    def check(tensor: Tensor) -> tuple[str, str, int]:
        digest, count = hashlib.sha256(), 0
        unsigned, exponent = _EXPONENTS[tensor.dtype]
        for chunk in read_chunks(tensor):
            digest.update(chunk)
            values = np.frombuffer(chunk, unsigned) & unsigned(exponent)
            # The maximum is several times cheaper than a count, which is needed only for bad chunks.
            if values.max() == exponent:
                count += int(np.count_nonzero(values == exponent))
            progress(len(chunk))
        return tensor.name, digest.hexdigest(), count

    tensors = sorted(tensors, key=lambda tensor: -tensor.nbytes)
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results = list(pool.map(check, tensors))
    return {name: digest for name, digest, _ in results}, {name: count for name, _, count in results if count}
