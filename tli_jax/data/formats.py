"""Which format a file is in, by its name and its first bytes."""

import codecs
import importlib
import re
from pathlib import Path
from typing import Any

from tli_jax.data.records import BadDocumentError
from tli_jax.errors import DataError, UsageError

HEAD = 512  # bytes that identify a file's content

# Format by file extension. Files with any other name are plain text if their content is.
KINDS = {
    **dict.fromkeys((".txt", ".text"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
    **dict.fromkeys((".array_record", ".arrayrecord"), "array_record"),
}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_LINE_FORMATS = ("text", "json", "csv")  # may be compressed, and their records are located by line

# Content by the first bytes of a file. Plain text starts with none of these.
_MAGIC = (
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data"),
    (b"\xfd7zXZ\0", "xz data"),
    (b"BZh91AY&SY", "bzip2 data"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"PAR1\x15", "Parquet"),
    (b"ARROW1\0\0", "an Arrow file"),
    (b"\xff\xff\xff\xff", "an Arrow stream"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF\r\n", "HDF5"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"%PDF-", "a PDF document"),
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"\x7fELF", "a program"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself"),
    (b"\xff\xfe", "UTF-16 text, not UTF-8"),
    (b"\xfe\xff", "UTF-16 text, not UTF-8"),
)
_HTML = re.compile(rb"(?i)\s*(<\?xml[^>]*>\s*)?(<!--.{0,200}?-->\s*)?(<!doctype\s+html|<html[\s>])", re.DOTALL)
_READABLE = {"Parquet": "parquet", "an Arrow file": "arrow", "an Arrow stream": "arrow"}


def need(module: str) -> Any:
    """Import a library for a data format.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise UsageError(f"reading this source needs {package}: pip install {package}") from None


def kind_by_name(file: Path) -> str | None:
    """The format by extension, ignoring one for compression; None if the extension is unknown."""
    return KINDS.get((file.with_suffix("") if is_compressed(file) else file).suffix.lower())


def is_compressed(file: Path) -> bool:
    return file.suffix.lower() in COMPRESSED


def unit(kind: str) -> str:
    """What messages count in a file of this format."""
    return "line" if kind in _LINE_FORMATS else "record"


def recognize(head: bytes) -> str | None:
    """Name what content is by ``head``, its first bytes; None if it may be plain text."""
    head = head.removeprefix(codecs.BOM_UTF8)
    if _HTML.match(head):
        return "an HTML page"
    if head[257:262] == b"ustar":
        return "a tar archive"
    return next((what for magic, what in _MAGIC if head.startswith(magic)), None)


def find_kind(file: Path) -> str:
    """The format of a file, by name and content.

    Raises:
        BadDocumentError: name and content contradict each other.
        DataError: it holds token ids, or is a compressed file of a binary format.
    """
    named = kind_by_name(file)
    if is_compressed(file):
        if named not in (None, *_LINE_FORMATS):
            raise DataError(f"{file}: {named} cannot be read while compressed as {file.suffix}: decompress it")
        return named or "text"  # the content is checked when it is decompressed
    if file.suffix.lower() == ".npy":
        raise DataError(f"{file}: token ids cannot be mixed with text files: give this file as a source of its own")
    with file.open("rb") as opened:
        content = recognize(opened.read(HEAD))
    kind = _READABLE.get(content or "")
    if kind and named in (None, kind):
        return kind
    if content and not (content == "an HTML page" and file.suffix.lower() in (".html", ".htm", ".xhtml")):
        raise BadDocumentError(f"is {content}")
    return named or "text"
