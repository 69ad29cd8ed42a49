"""Records of text, JSON and CSV, read one by one from a stream of bytes."""

import codecs
import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tli_jax.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")


class Record(NamedTuple):
    """A record that may be a document.

    Attributes:
        number: line on which it starts, or its index from 1 in formats without lines.
        content: text or bytes of the document; bytes of a JSON line; a parsed JSON value; None for null; or the
            BadDocumentError that describes why it cannot be used.
        share: fraction of the file read so far, if the format knows it.
    """

    number: int
    content: Any
    share: float | None = None


class BadDocumentError(Exception):
    """A record that cannot be used: the reason, and how many lines into the record the fault is."""

    def __init__(self, reason: str, lines: int = 0):
        self.reason, self.lines = reason, lines


def universal_newlines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    r"""Replace every ``\r\n`` and lone ``\r`` by ``\n``, across chunks too."""
    held = b""
    for chunk in chunks:
        chunk = held + chunk
        held = b"\r" if chunk.endswith(b"\r") else b""
        yield normalize_newlines(chunk.removesuffix(held))
    if held:
        yield b"\n"


def normalize_newlines(text: bytes) -> bytes:
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def split(chunks: Iterable[bytes], separator: bytes | None) -> Iterator[tuple[int, bytes]]:
    """Split a stream at its separators, into ``(line on which the part starts, part)``.

    An empty part after the last separator is dropped.
    """
    line, pending = 1, bytearray()
    for chunk in chunks:
        # A separator may cross the border of two chunks, so search from just before it.
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
    """JSON lines as bytes, or the parsed items of one JSON array."""
    head = b""
    for chunk in chunks:
        head += chunk
        if head.strip():
            break
    stream = itertools.chain([head], chunks)
    if head.lstrip().startswith(b"["):
        yield from _read_array(stream)
    else:
        yield from itertools.starmap(Record, split(stream, b"\n"))


def _read_array(chunks: Iterable[bytes]) -> Iterator[Record]:
    """Items of a JSON array. Memory holds little more than the longest item.

    Raises:
        ValueError: not JSON, or truncated.
    """
    decode = json.JSONDecoder().raw_decode
    texts = codecs.iterdecode(chunks, "utf-8")
    buffer, at, line, is_complete = "", 0, 1, False

    def fill() -> None:
        # Doubles the buffer, so that a long item is not parsed once per chunk.
        nonlocal buffer, at, is_complete
        parts, size = [buffer[at:]], 0
        while size <= len(parts[0]) and not is_complete:
            part = next(texts, None)
            is_complete = part is None
            parts.append(part or "")
            size += len(parts[-1])
        buffer, at = "".join(parts), 0

    def take(wanted: str) -> str:
        """Skip white space, then return the next character if it is wanted."""
        nonlocal at, line
        while True:
            end = _SPACE.match(buffer, at).end()  # type: ignore[union-attr]  # always matches
            line += buffer.count("\n", at, end)
            at = end
            if at < len(buffer) or is_complete:
                break
            fill()
        char = buffer[at : at + 1]
        if not char or char not in wanted:
            return ""
        at += 1
        return char

    take("[")
    separator = "," if not take("]") else ""
    while separator:
        take("")
        while True:
            try:
                value, end = decode(buffer, at)
                break
            except RecursionError:
                raise ValueError(f"line {line}: nested too deeply") from None
            except json.JSONDecodeError as error:
                # An unterminated string, or an error near the end, may be valid with more of the file.
                is_truncated = error.msg.startswith("Unterminated") or error.pos > len(buffer) - 16
                if is_complete or not is_truncated:
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
        raise ValueError(f"line {line}: more text after the end of the array")


def read_csv(file: Path, chunks: Iterator[bytes], field: str) -> Iterator[Record]:
    """Column ``field`` of comma- or tab-separated values with a header row.

    Raises:
        DataError: no such column.
        ValueError: unclosed quotes.
    """
    csv.field_size_limit(sys.maxsize)  # applies to the process; the default refuses texts above 128 KiB
    delimiter = "\t" if ".tsv" in (file.suffix.lower(), file.with_suffix("").suffix.lower()) else ","
    # Surrogates carry bad UTF-8, so that one bad row does not spoil the others.
    lines = (line.decode("utf-8", "surrogateescape") + "\n" for _, line in split(chunks, b"\n"))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    columns, line = None, 1
    try:
        for row in rows:
            first, line = line, rows.line_num + 1
            if not row:
                continue
            if columns is None:
                columns = row
                check_column(file, field, columns)
            elif len(row) != len(columns):
                yield Record(first, BadDocumentError(f"{len(row):,} cells under {len(columns):,} columns"))
            else:
                yield Record(first, row[columns.index(field)])
    except csv.Error as error:
        raise ValueError(error) from None


def check_column(file: Path, field: str, columns: list[str]) -> None:
    """Raises DataError: the table does not have exactly one such column."""
    if columns.count(field) != 1:
        problem = "appears twice" if field in columns else "does not exist"
        raise DataError(f"{file}: column {field!r} {problem}: set field to one of {join_names(columns)}")


def join_names(columns: Iterable[str]) -> str:
    """Column names for a message, shortened."""
    names = [name if len(name) < 40 else f"{name[:40]}…" for name in columns]
    return ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")
