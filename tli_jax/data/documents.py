"""Documents out of files: which formats are read, and what is said of a document that cannot be."""

import codecs
import gzip
import importlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tli_jax.config import Recipe
from tli_jax.errors import DataError, MissingInputError, TliError, UsageError, nearest

CHUNK = 2**20  # bytes that are read at a time
_KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
}
_PLACES = 5  # of bad documents, that are named


class Documents:
    """The documents of a source, in the order of its files; to be iterated over once, and then asked about.

    ``count`` documents were given, ``empty`` ones left out, ``bad`` ones counted by what is wrong with them, and
    ``places`` names the first few of these. ``done`` is how many of ``nbytes`` have been read so far.

    Raises:
        MissingInputError: the path is not there.
        DataError: on the way, at the first bad document, with ``on_bad`` "refuse"; or at the end, if there is none.
        UsageError: a library is missing that the format needs.
    """

    def __init__(self, path: Path, config: Recipe):
        self.path, self.config = path, config
        self.files = list_files(path)
        self.nbytes = sum(file.stat().st_size for file in self.files)
        self.done = self.count = self.empty = 0
        self.bad: Counter[str] = Counter()
        self.places: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            end = self.done + file.stat().st_size
            for text in self._readable(file):
                if not text or text.isspace():
                    self.empty += 1
                    continue
                self.count += 1
                yield text
            self.done = end
        if not self.count:
            raise DataError(f"{self.path}: no document with text in it: give another source")

    def _readable(self, file: Path) -> Iterator[str]:
        kind = _kind(file)
        unit = "line" if kind in ("text", "json") else "record"
        number = 0
        if not file.stat().st_size:
            return self._report("empty file", str(file))
        try:
            for number, raw in self._records(file, kind):
                try:
                    yield _parse(raw, kind, self.config.field)
                except _BadDocumentError as bad:
                    self._report(bad.reason, f"{file}: {unit} {number + bad.lines}")
        except _BrokenFileError as broken:
            self._report("broken file", f"{file}: after {unit} {number}", f" ({' '.join(str(broken).split())[:100]})")

    def _report(self, reason: str, place: str, detail: str = "") -> None:
        if self.config.on_bad == "refuse":
            raise DataError(f"{place}: {reason}{detail}: mend it, or leave such documents out by --on-bad skip")
        self.bad[reason] += 1
        self.places += [place] * (len(self.places) < _PLACES)

    def _records(self, file: Path, kind: str) -> Iterator[tuple[int, bytes | None]]:
        """Number of the line on which it starts, or of the record, and what may be a document."""
        try:
            if kind == "text":
                separator = self.config.separator
                yield from split(self._chunks(file), separator.encode() if separator else None)
            elif kind == "json":
                yield from split(self._chunks(file), b"\n")
            else:
                done, size = self.done, file.stat().st_size
                read = _read_array_record(file) if kind == "array_record" else _read_arrow(file, kind, self.config)
                for number, (share, raw) in enumerate(read, 1):
                    self.done = done + int(share * size)
                    yield number, raw
        except TliError:
            raise
        except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's trouble, not the file's
            raise _BrokenFileError(error) from error

    def _chunks(self, file: Path) -> Iterator[bytes]:
        done, mark = self.done, codecs.BOM_UTF8
        with file.open("rb") as raw:
            if file.suffix == ".zst":
                chunks = _decompress_zst(raw)
            else:
                # read1: what came before a break is handed out first.
                read = gzip.GzipFile(fileobj=raw).read1 if file.suffix == ".gz" else raw.read
                chunks = iter(lambda: read(CHUNK), b"")
            for chunk in chunks:
                self.done = done + raw.tell()
                yield chunk.removeprefix(mark)
                mark = b""  # only the first bytes of a file can be a byte order mark


class _BadDocumentError(Exception):
    def __init__(self, reason: str, lines: int = 0):
        self.reason, self.lines = reason, lines


class _BrokenFileError(Exception):
    pass


def list_files(path: Path) -> list[Path]:
    """The files of a source: itself; or in a folder all that are not hidden, sorted; or those of a ``datasets`` folder.

    Raises:
        MissingInputError: nothing is there.
        DataError: a folder without files, or a ``datasets`` folder that cannot be read.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MissingInputError(f"{path}: no such file or folder to read text from")
    if (path / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in path.iterdir() if (part / "state.json").is_file())
        if "train" not in splits:
            raise DataError(f"{path}: has no split 'train', only {', '.join(splits) or 'none'}: give a split's folder")
        path = path / "train"
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return _list_dataset(path)
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise DataError(f"{path}: has no files in it: give another source")
    return files


def need(module: str, package: str = "tli_jax[data]") -> Any:
    """A library that may be absent.

    Raises:
        UsageError: it is.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"reading this source needs {module.split('.')[0]}: pip install '{package}'") from None


def split(chunks: Iterator[bytes], separator: bytes | None) -> Iterator[tuple[int, bytes]]:
    """Cut a text at its separators, however it comes in; with the number of the line on which each part starts.

    What follows the last separator is a part only if there is anything.
    """
    line, pending = 1, bytearray()
    for chunk in chunks:
        # A separator may lie across two chunks; further back there is none.
        start = max(0, len(pending) - len(separator) + 1) if separator else 0
        pending += chunk
        while separator and (end := pending.find(separator, start)) >= 0:
            yield line, bytes(pending[:end])
            line += pending.count(b"\n", 0, end + len(separator))
            del pending[: end + len(separator)]
            start = 0
    if pending:
        yield line, bytes(pending)


def _kind(file: Path) -> str:
    is_packed = file.suffix in (".gz", ".zst")
    kind = _KINDS.get((file.with_suffix("") if is_packed else file).suffix.lower(), "text")
    if is_packed and kind not in ("text", "json"):
        raise DataError(f"{file}: {kind} is not read from within {file.suffix}: unpack it")
    if file.suffix == ".npy":
        raise DataError(f"{file}: token ids cannot stand in a folder of texts: give the file as a source of its own")
    return kind


def _parse(raw: bytes | None, kind: str, field: str) -> str:
    if raw is None:
        raise _BadDocumentError("null")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _BadDocumentError("not UTF-8", raw.count(b"\n", 0, error.start) if kind == "text" else 0) from None
    if (kind == "json" and text.strip()) or (kind == "array_record" and text.startswith("{")):
        text = _parse_json(text, field, may_be_text=kind == "array_record")
    if (nul := text.find("\0")) >= 0:
        raise _BadDocumentError("NUL character", text.count("\n", 0, nul) if kind == "text" else 0)
    return text


def _parse_json(line: str, field: str, may_be_text: bool) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        if may_be_text:
            return line
        raise _BadDocumentError("not JSON") from None
    if not isinstance(row, dict):
        raise _BadDocumentError("not a JSON object")
    if field not in row:
        raise _BadDocumentError(f"no field {field!r}{nearest(field, row)}")
    text = row[field]
    if not isinstance(text, str):
        raise _BadDocumentError(f"field {field!r} is not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadDocumentError("half a surrogate pair") from None
    return text


def _decompress_zst(raw: BinaryIO) -> Iterator[bytes]:
    # Not stream_reader: that takes a file which was cut for one that ends.
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


def _list_dataset(folder: Path) -> list[Path]:
    # What datasets.save_to_disk writes is Arrow streams and a list of them: pyarrow alone reads it.
    state = folder / "state.json"
    try:
        raw = json.loads(state.read_bytes())
        names = [Path(one["filename"]) for one in raw["_data_files"]]
        if raw.get("_indices_data_files") or not names or any(name.name != str(name) for name in names):
            raise ValueError("no files, or not in order")
    except (ValueError, TypeError, LookupError, RecursionError):
        raise DataError(f"{state}: does not list the files of a dataset: write it again, with save_to_disk") from None
    for name in names:
        if not (folder / name).is_file():
            raise MissingInputError(f"{folder / name}: is listed in {state.name}, but not there")
    return [folder / name for name in names]


def _read_arrow(file: Path, kind: str, config: Recipe) -> Iterator[tuple[float, bytes | None]]:
    """The share of the file that has been read, and the text of a row."""
    pyarrow = need("pyarrow")
    with pyarrow.memory_map(str(file)) as mapped:
        if kind == "parquet":
            table = need("pyarrow.parquet").ParquetFile(mapped)
            schema, rows = table.schema_arrow, table.metadata.num_rows
        else:
            table = need("pyarrow.ipc").open_stream(mapped)
            schema, rows = table.schema, 0
        known = dict(zip(schema.names, map(str, schema.types), strict=True))
        if known.get(config.field) not in ("string", "large_string"):
            why = f"is {known[config.field]}, not text" if config.field in known else "is not there"
            raise DataError(f"{file}: column {config.field!r} {why}: set field to one of {', '.join(known)}")
        batches = table.iter_batches(1024, columns=[config.field]) if kind == "parquet" else table
        done = 0
        for batch in batches:
            done += batch.num_rows
            share = done / rows if rows else mapped.tell() / max(mapped.size(), 1)
            # As bytes: one row that is not UTF-8 must not take the others with it.
            for value in batch.column(config.field).cast(pyarrow.large_binary()).to_pylist():
                yield share, value


def _read_array_record(file: Path) -> Iterator[tuple[float, bytes]]:
    reader = need("array_record.python.array_record_module", "array_record").ArrayRecordReader(str(file))
    if not reader.ok():
        raise ValueError("not an ArrayRecord file, or cut")
    count = reader.num_records()
    try:
        for start in range(0, count, 256):
            end = min(start + 256, count)
            for raw in reader.read(start, end):
                yield end / count, raw
    finally:
        reader.close()
