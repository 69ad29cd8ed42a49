"""Records of Parquet, Arrow and ArrayRecord files, which may hold arbitrary bytes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tli_jax.data.formats import need
from tli_jax.data.records import Record, check_column, join_names
from tli_jax.errors import DataError


def read_array_record(file: Path) -> Iterator[Record]:
    """Records of an ArrayRecord file, as bytes.

    Raises:
        ValueError, RuntimeError: the file is damaged.
    """
    reader = need("array_record.python.array_record_module").ArrayRecordReader(str(file))
    if not reader.ok():
        raise ValueError("not an ArrayRecord file, or truncated")
    count = reader.num_records()
    try:
        for start in range(0, count, 256):
            end = min(start + 256, count)
            for i, raw in enumerate(reader.read(start, end), start + 1):
                yield Record(i, raw, end / count)
    finally:
        reader.close()


def read_arrow(file: Path, kind: str, field: str) -> Iterator[Record]:
    """Column ``field`` of a Parquet file, an Arrow stream (as ``datasets`` saves) or an Arrow file (Feather 2).

    Nothing is memory-mapped, and arrays are validated before use: offsets in a damaged file may point anywhere.

    Raises:
        DataError: no such column, or it is not text.
        ValueError, OSError: the file is damaged.
    """
    pyarrow = need("pyarrow")
    number, rows = 0, None
    try:
        with pyarrow.OSFile(str(file)) as opened:
            if kind == "parquet":
                table = need("pyarrow.parquet").ParquetFile(opened)
                _check_text_column(pyarrow, file, table.schema_arrow, field)
                rows = table.metadata.num_rows
                batches = ((None, batch) for batch in table.iter_batches(1024, columns=[field]))
            else:
                batches = _read_ipc(pyarrow, opened, file, field)
            for share, batch in batches:
                for value in _to_bytes(pyarrow, batch.column(field)):
                    number += 1
                    yield Record(number, value, number / rows if rows else share)
    except pyarrow.ArrowException as error:  # some are also a KeyError or a MemoryError
        raise ValueError(error) from None
    if rows not in (None, number):
        raise ValueError(f"{number:,} rows instead of {rows:,}")


def _read_ipc(pyarrow: Any, opened: Any, file: Path, field: str) -> Iterator[tuple[float | None, Any]]:
    """Batches of one column, with the fraction of the file read so far."""
    ipc = need("pyarrow.ipc")
    is_file = opened.read(6) == b"ARROW1"
    opened.seek(0)
    open_ipc = ipc.open_file if is_file else ipc.open_stream
    schema = open_ipc(opened).schema
    _check_text_column(pyarrow, file, schema, field)
    options = ipc.IpcReadOptions(included_fields=[schema.get_field_index(field)])
    opened.seek(0)
    table = open_ipc(opened, options=options)
    if is_file:
        for i in range(table.num_record_batches):
            yield (i + 1) / table.num_record_batches, table.get_batch(i)
    else:
        size = max(opened.size(), 1)
        for batch in table:
            yield opened.tell() / size, batch


def _check_text_column(pyarrow: Any, file: Path, schema: Any, field: str) -> None:
    check_column(file, field, schema.names)
    dtype = schema.field(field).type
    values = dtype.value_type if pyarrow.types.is_dictionary(dtype) else dtype
    if str(values) not in ("string", "large_string", "string_view"):
        raise DataError(
            f"{file}: column {field!r} is {dtype}, not text: set field to one of {join_names(schema.names)}"
        )


def _to_bytes(pyarrow: Any, array: Any) -> list[bytes | None]:
    """Values of a column as bytes, so that a row that is not UTF-8 does not spoil the others."""
    binary = {"string": pyarrow.binary(), "large_string": pyarrow.large_binary(), "string_view": pyarrow.binary_view()}
    if pyarrow.types.is_dictionary(array.type):
        values = array.dictionary.view(binary[str(array.type.value_type)])
        values.validate(full=True)
        array.indices.validate(full=True)
        # from_arrays refuses an index beyond the end.
        array = pyarrow.DictionaryArray.from_arrays(array.indices, values).dictionary_decode()
    else:
        array = array.view(binary[str(array.type)])
    array.validate(full=True)
    return array.to_pylist()
