"""The formats that text is read from: telling them apart, unpacking them, and reading their records one by one."""

import bz2
import codecs
import csv
import gzip
import importlib
import itertools
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tli_jax.errors import DataError, UsageError

CHUNK = 2**20  # bytes read at a time
HEAD = 512  # bytes that tell what a file holds

# Format by file extension; any other name is plain text, if its content is.
KINDS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".jsonlines": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
}
PACKED = (".gz", ".zst", ".xz", ".bz2")
_LINES = ("text", "json", "csv")  # formats that may be compressed, and whose records start on a line

# What the first bytes of a file say it is. Plain text starts with none of these.
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
_SPACE = re.compile(r"[ \t\r\n]*")
_READABLE = {"Parquet": "parquet", "an Arrow file": "arrow", "an Arrow stream": "arrow"}


class Record(NamedTuple):
    """Something that may be a document.

    Attributes:
        number: the line it starts on, or which record it is, from 1.
        content: bytes or text of the document; or bytes of a JSON line; a parsed JSON value; None where it is null.
        share: of the file read so far, where the format knows.
    """

    number: int
    content: Any
    share: float | None = None


class BadDocumentError(Exception):
    """A single record that cannot be used: ``reason``, and the number of lines into it where that is."""

    def __init__(self, reason: str, lines: int = 0):
        self.reason, self.lines = reason, lines


def need(module: str, package: str = "tli_jax[data]") -> Any:
    """Import an optional library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"reading this source needs {module.split('.')[0]}: pip install '{package}'") from None


def kind_by_name(file: Path) -> str | None:
    """Format by extension, below one for compression; None where the extension is not known."""
    return KINDS.get((file.with_suffix("") if is_packed(file) else file).suffix.lower())


def is_packed(file: Path) -> bool:
    return file.suffix.lower() in PACKED


def unit(kind: str) -> str:
    """What the records of a format are counted in."""
    return "line" if kind in _LINES else "record"


def recognise(head: bytes) -> str | None:
    """What a file is by its first bytes, in words; None for what may be plain text."""
    head = head.removeprefix(codecs.BOM_UTF8)
    if _HTML.match(head):
        return "an HTML page"
    if head[257:262] == b"ustar":
        return "a tar archive"
    return next((what for magic, what in _MAGIC if head.startswith(magic)), None)


def find_kind(file: Path) -> str:
    """Format of a file, by its name and its content together.

    Raises:
        BadDocumentError: they contradict each other; says what the content is.
        DataError: it is token ids, or a binary format inside a compressed file.
    """
    named = kind_by_name(file)
    if is_packed(file):
        if named not in (None, *_LINES):
            raise DataError(f"{file}: {named} cannot be read from inside {file.suffix}: unpack it")
        return named or "text"  # what is inside is looked at when it is unpacked
    if file.suffix.lower() == ".npy":
        raise DataError(f"{file}: token ids cannot be mixed with text files: give this file as a source of its own")
    with file.open("rb") as opened:
        found = recognise(opened.read(HEAD))
    kind = _READABLE.get(found or "")
    if kind and named in (None, kind):
        return kind
    if found and not (found == "an HTML page" and file.suffix.lower() in (".html", ".htm", ".xhtml")):
        raise BadDocumentError(f"is {found}")
    return named or "text"


def read_chunks(file: Path, told: Callable[[int], None] = lambda at: None) -> Iterator[bytes]:
    """Unpacked bytes of a file, without a byte order mark, as they come.

    Args:
        told: called with the position in the file.

    Raises:
        BadDocumentError: what is inside a compressed file is not text.
        OSError, EOFError, ValueError, zlib.error, lzma.LZMAError: damaged.
    """
    with file.open("rb") as raw:
        chunks = _unpack(raw, file.suffix.lower())
        head = b""
        for chunk in chunks:
            head += chunk
            if len(head) >= HEAD:
                break
        if is_packed(file) and (found := recognise(head)):
            raise BadDocumentError(f"holds {found}")
        told(raw.tell())
        yield head.removeprefix(codecs.BOM_UTF8)
        for chunk in chunks:
            told(raw.tell())
            yield chunk


def _unpack(raw: BinaryIO, suffix: str) -> Iterator[bytes]:
    if suffix == ".zst":
        return _decompress_zst(raw)
    if suffix == ".gz":
        read = gzip.GzipFile(fileobj=raw).read1  # read1: what comes before damage is returned first
    elif suffix == ".xz":
        read = lzma.LZMAFile(raw).read1  # noqa: SIM115  # whoever opened ``raw`` closes it
    elif suffix == ".bz2":
        read = bz2.BZ2File(raw).read1
    else:
        read = raw.read
    return iter(lambda: read(CHUNK), b"")


def _decompress_zst(raw: BinaryIO) -> Iterator[bytes]:
    # Not stream_reader: that takes a truncated file for a complete one.
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
        raise EOFError("the last frame is cut")


def universal_newlines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    r"""The same text with every ``\r\n`` and lone ``\r`` replaced by ``\n``."""
    held = b""
    for chunk in chunks:
        chunk = held + chunk
        held = b"\r" if chunk.endswith(b"\r") else b""
        yield with_line_feeds(chunk.removesuffix(held))
    if held:
        yield b"\n"


def with_line_feeds(text: bytes) -> bytes:
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def split(chunks: Iterable[bytes], separator: bytes | None) -> Iterator[tuple[int, bytes]]:
    """Cut a text at its separators, however it comes in; with the number of the line on which each part starts.

    What follows the last separator is a part only if there is anything.
    """
    line, pending = 1, bytearray()
    for chunk in chunks:
        # A separator may cross the border of two chunks; no further back is there one.
        start = max(0, len(pending) - len(separator) + 1) if separator else 0
        pending += chunk
        while separator and (end := pending.find(separator, start)) >= 0:
            yield line, bytes(pending[:end])
            line += pending.count(b"\n", 0, end + len(separator))
            del pending[: end + len(separator)]
            start = 0
    if pending:
        yield line, bytes(pending)


def read_json(chunks: Iterator[bytes]) -> Iterator[Record]:
    """JSON lines, a line each; or the items of one array, parsed, numbered by the line they start on."""
    head = b""
    for chunk in chunks:
        head += chunk
        if head.strip():
            break
    rest = itertools.chain([head], chunks)
    if head.lstrip().startswith(b"["):
        yield from _read_array(rest)
    else:
        yield from (Record(*one) for one in split(rest, b"\n"))


def _read_array(chunks: Iterable[bytes]) -> Iterator[Record]:
    """The items of a JSON array; holds little more than the longest one in memory.

    Raises:
        ValueError: it is not JSON, or is cut.
    """
    decode = json.JSONDecoder().raw_decode
    texts = codecs.iterdecode(chunks, "utf-8")
    buffer, at, line, is_whole = "", 0, 1, False

    def fill() -> None:
        # Doubles what there is, so that a long item is not parsed once for each chunk.
        nonlocal buffer, at, is_whole
        parts, size = [buffer[at:]], 0
        while size <= len(parts[0]) and not is_whole:
            part = next(texts, None)
            is_whole = part is None
            parts.append(part or "")
            size += len(parts[-1])
        buffer, at = "".join(parts), 0

    def take(wanted: str) -> str:
        """Skip white space, and one of these characters, which is returned."""
        nonlocal at, line
        while True:
            end = _SPACE.match(buffer, at).end()  # type: ignore[union-attr]  # matches always
            line += buffer.count("\n", at, end)
            at = end
            if at < len(buffer) or is_whole:
                break
            fill()
        found = buffer[at : at + 1]
        if not found or found not in wanted:
            return ""
        at += 1
        return found

    take("[")
    separator = "," if not take("]") else ""
    while separator:
        take("")
        while True:
            try:
                value, end = decode(buffer, at)
                break
            except RecursionError:
                raise ValueError(f"line {line}: nested too deep") from None
            except json.JSONDecodeError as error:
                # A string without an end, or an error near the end, may be well with more of the file.
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(buffer) - 16
                if is_whole or not is_cut:
                    wrong = line + buffer.count("\n", at, error.pos)
                    raise ValueError(f"line {wrong} is not JSON: {error.msg}") from None
            fill()
        yield Record(line, value)
        line += buffer.count("\n", at, end)
        at = end
        separator = take(",")
        if not separator and not take("]"):
            raise ValueError(f"line {line}: the array does not end")
    take("")
    if at < len(buffer):
        raise ValueError(f"line {line}: more after the end of the array")


def read_csv(file: Path, chunks: Iterator[bytes], field: str) -> Iterator[Record]:
    """Column ``field`` of comma-separated values, or tab-separated ones, below a row with the names of the columns.

    Raises:
        DataError: there is no such column.
        ValueError: quotes are not closed.
    """
    csv.field_size_limit(sys.maxsize)  # of the whole process; the default refuses texts above 128 KiB
    separator = "\t" if file.with_suffix("").suffix.lower() == ".tsv" or file.suffix.lower() == ".tsv" else ","
    # Bad UTF-8 is carried as surrogates, so that one row does not take the others with it.
    rows = csv.reader(_text_lines(chunks), delimiter=separator, strict=True)
    columns, line = None, 1
    try:
        for row in rows:
            first, line = line, rows.line_num + 1
            if not row:
                continue  # an empty line
            if columns is None:
                columns = row
                if row.count(field) != 1:
                    why = "is there twice" if field in row else "is not there"
                    raise DataError(f"{file}: column {field!r} {why}: set field to one of {join_names(row)}")
            else:
                same = len(row) == len(columns)
                wrong = BadDocumentError(f"{len(row):,} cells under {len(columns):,} columns")
                yield Record(first, row[columns.index(field)] if same else wrong)
    except csv.Error as error:
        raise ValueError(error) from None


def _text_lines(chunks: Iterator[bytes]) -> Iterator[str]:
    # The csv module wants lines with their ends.
    for _, line in split(chunks, b"\n"):
        yield line.decode("utf-8", "surrogateescape") + "\n"


def join_names(columns: Iterable[str]) -> str:
    """Names of columns for a message, shortened."""
    names = [name if len(name) < 40 else f"{name[:40]}…" for name in columns]
    return ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")


def read_array_record(file: Path) -> Iterator[Record]:
    """The records of an ArrayRecord file.

    Raises:
        ValueError, RuntimeError: damaged.
    """
    reader = need("array_record.python.array_record_module", "array_record").ArrayRecordReader(str(file))
    if not reader.ok():
        raise ValueError("not an ArrayRecord file, or cut")
    count = reader.num_records()
    try:
        for start in range(0, count, 256):
            end = min(start + 256, count)
            for i, raw in enumerate(reader.read(start, end), start + 1):
                yield Record(i, raw, end / count)
    finally:
        reader.close()
