"""Documents from files of any format, and a report of the ones that cannot be read."""

import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tli_jax.cli.train_config import TextConfig
from tli_jax.data import formats, records
from tli_jax.data.columnar import read_array_record, read_arrow
from tli_jax.data.decompress import read_chunks
from tli_jax.data.records import BadDocumentError, Record
from tli_jax.data.sources import find_files
from tli_jax.errors import DataError, MissingInputError, TliError, nearest

_MAX_PLACES = 5  # bad documents that are named


class Documents:
    """The documents of a source, in the order of its files. Iterate over it once, then read its counts.

    Attributes:
        count: documents returned.
        empty: documents without text, which are skipped.
        bad: skipped documents by reason.
        places: file and line of the first few of them.
        notes: one line for each thing that may surprise a reader.
        done: bytes read so far, of ``nbytes`` in all files.

    Raises:
        MissingInputError: the path does not exist.
        DataError: while iterating: a bad document where ``on_bad`` is "refuse", or no document has text.
        UsageError: a library that the format needs is not installed.
    """

    def __init__(self, path: Path, config: TextConfig):
        self.path, self.config = path, config
        self.files = find_files(path).files
        self.nbytes = sum(file.stat().st_size for file in self.files)
        self.done = self.count = self.empty = 0
        self.bad: Counter[str] = Counter()
        self.places: list[str] = []
        self.notes: list[str] = []
        self.advice = "fix it, or skip such documents with --on-bad skip"
        self._separators: int | None = None  # separators in plain text; None without plain text

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            end = self.done + file.stat().st_size
            for text in self._texts(file):
                if not text or text.isspace():
                    self.empty += 1
                    continue
                self.count += 1
                yield text
            self.done = end
        if not self.count:
            raise DataError(f"{self.path}: no document contains text: give another source")
        if self._separators == 0:
            effect = "it is one document" if len(self.files) == 1 else "each file of plain text is one document"
            self.notes.append(f"separator {self.config.separator!r} never occurs, so {effect}")

    def _texts(self, file: Path) -> Iterator[str]:
        done, size = self.done, file.stat().st_size
        if not size:
            return self._report("empty file", str(file))
        kind, number = "", 0
        try:
            kind = formats.find_kind(file)
            for number, content, share in self._read(file, kind):
                if share is not None:
                    self.done = done + int(share * size)
                try:
                    yield _parse(content, kind, self.config.field)
                except BadDocumentError as bad:
                    self._report(bad.reason, f"{file}: {_place(file, kind, number + bad.lines)}")
        except BadDocumentError as bad:
            self._report(bad.reason, str(file))
        except TliError:
            raise
        except (OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system failed to read the file, which does not mean that it is damaged
            why = " ".join(str(error).split())[:100]
            self._report("broken file", f"{file}: after {_place(file, kind, number)}", f" ({why})")

    def _report(self, reason: str, place: str, detail: str = "") -> None:
        if self.config.on_bad == "refuse":
            raise DataError(f"{place}: {reason}{detail}: {self.advice}")
        self.bad[reason] += 1
        self.places += [place] * (len(self.places) < _MAX_PLACES)

    def _read(self, file: Path, kind: str) -> Iterator[Record]:
        field, done = self.config.field, self.done

        def on_position(position: int) -> None:
            self.done = done + position

        if kind in ("parquet", "arrow"):
            return read_arrow(file, kind, field)
        if kind == "array_record":
            return read_array_record(file)
        chunks = read_chunks(file, on_position)
        if kind == "json":
            return records.read_json(chunks)
        if kind == "csv":
            return records.read_csv(file, chunks, field)
        return self._split(chunks)

    def _split(self, chunks: Iterator[bytes]) -> Iterator[Record]:
        separator = records.normalize_newlines(self.config.separator.encode()) if self.config.separator else None
        number = 0
        for line, part in records.split(records.universal_newlines(chunks), separator):
            number += 1
            yield Record(line, part)
        if separator:
            self._separators = (self._separators or 0) + max(number - 1, 0)


def read_plain(file: Path) -> str:
    r"""Read a plain UTF-8 text file, compressed or not, with ``\n`` as line ends and no byte order mark.

    Raises:
        MissingInputError: it does not exist.
        DataError: it is not plain text, not UTF-8, damaged or empty.
    """
    if not file.is_file():
        raise MissingInputError(f"{file}: no such text file")
    if (kind := formats.kind_by_name(file) or "text") != "text":
        raise DataError(f"{file}: is {kind} by its name: give plain text")
    documents = Documents(file, TextConfig())
    documents.advice = "fix it, or give another file"
    return "".join(documents)


def _place(file: Path, kind: str, number: int) -> str:
    return f"{formats.unit(kind)} {number}{' of the decompressed text' if formats.is_compressed(file) else ''}"


def _parse(content: Any, kind: str, field: str) -> str:
    """The text of a record.

    Raises:
        BadDocumentError: it has none, or is damaged.
    """
    if isinstance(content, BadDocumentError):
        raise content
    if isinstance(content, bytes):
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            lines = content.count(b"\n", 0, error.start) if kind == "text" else 0
            raise BadDocumentError("not UTF-8", lines) from None
        if (kind == "json" and text.strip()) or (kind == "array_record" and text.startswith("{")):
            text = _parse_line(text, field, may_be_text=kind == "array_record")
    elif kind == "json":
        text = _take_field(content, field)
    elif content is None:
        raise BadDocumentError("null")
    else:
        text = content
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadDocumentError("not UTF-8" if kind == "csv" else "lone surrogate") from None
    if (nul := text.find("\0")) >= 0:
        raise BadDocumentError("NUL character", text.count("\n", 0, nul) if kind == "text" else 0)
    return text


def _parse_line(line: str, field: str, may_be_text: bool) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        if may_be_text:
            return line
        raise BadDocumentError("not JSON") from None
    return _take_field(row, field)


def _take_field(row: Any, field: str) -> str:
    if not isinstance(row, dict):
        raise BadDocumentError("not a JSON object")
    if field not in row:
        raise BadDocumentError(f"no field {field!r}{nearest(field, row)}")
    if not isinstance(row[field], str):
        raise BadDocumentError(f"field {field!r} is not text")
    return row[field]
