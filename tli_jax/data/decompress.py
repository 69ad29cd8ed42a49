"""The decompressed bytes of a file."""

import bz2
import codecs
import gzip
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from tli_jax.data.formats import HEAD, is_compressed, need, recognize
from tli_jax.data.records import BadDocumentError

CHUNK = 2**20  # bytes read at a time


def read_chunks(file: Path, on_position: Callable[[int], None] = lambda position: None) -> Iterator[bytes]:
    """Decompressed chunks of a file, without a byte order mark.

    Args:
        on_position: callback with the position in the compressed file.

    Raises:
        BadDocumentError: a compressed file does not hold text.
        OSError, EOFError, ValueError, zlib.error, lzma.LZMAError: the file is damaged.
    """
    with file.open("rb") as raw:
        chunks = _decompress(raw, file.suffix.lower())
        head = b""
        for chunk in chunks:
            head += chunk
            if len(head) >= HEAD:
                break
        if is_compressed(file) and (content := recognize(head)):
            raise BadDocumentError(f"holds {content}")
        on_position(raw.tell())
        yield head.removeprefix(codecs.BOM_UTF8)
        for chunk in chunks:
            on_position(raw.tell())
            yield chunk


def _decompress(raw: BinaryIO, suffix: str) -> Iterator[bytes]:
    if suffix == ".zst":
        return _decompress_zst(raw)
    if suffix == ".gz":
        read = gzip.GzipFile(fileobj=raw).read1  # read1 returns what precedes the damage, read does not
    elif suffix == ".xz":
        read = lzma.LZMAFile(raw).read1  # noqa: SIM115  # the caller closes ``raw``
    elif suffix == ".bz2":
        read = bz2.BZ2File(raw).read1
    else:
        read = raw.read
    return iter(lambda: read(CHUNK), b"")


def _decompress_zst(raw: BinaryIO) -> Iterator[bytes]:
    # stream_reader would take a truncated file for a complete one.
    zstandard = need("zstandard")
    frame = None
    try:
        while data := raw.read(CHUNK // 8):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise EOFError(error) from None
    if frame:
        raise EOFError("the last frame is truncated")
