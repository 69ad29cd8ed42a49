"""A column of text out of Parquet and Arrow files, whatever bytes these hold."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tli_jax.data.formats import Record, join_names, need
from tli_jax.errors import DataError


def read_arrow(file: Path, kind: str, field: str) -> Iterator[Record]:
    """Column ``field`` of Parquet, of an Arrow stream (what ``datasets`` saves) or of an Arrow file (Feather 2).

    Nothing is mapped into memory, and only validated arrays are looked into: offsets in a damaged file may point
    anywhere.

    Raises:
        DataError: there is no such column, or it is not text.
        ValueError, OSError: damaged.
    """
    pyarrow = need("pyarrow")
    number, rows = 0, None
    try:
        with pyarrow.OSFile(str(file)) as opened:
            if kind == "parquet":
                table = need("pyarrow.parquet").ParquetFile(opened)
                _check_column(pyarrow, file, table.schema_arrow, field)
                rows = table.metadata.num_rows
                parts = ((None, batch) for batch in table.iter_batches(1024, columns=[field]))
            else:
                parts = _read_ipc(pyarrow, opened, file, field)
            for share, batch in parts:
                for value in _texts(pyarrow, batch.column(field)):
                    number += 1
                    yield Record(number, value, number / rows if rows else share)
    except pyarrow.ArrowException as error:  # of many kinds, a KeyError and a MemoryError among them
        raise ValueError(error) from None
    if rows not in (None, number):
        raise ValueError(f"{number:,} rows, where {rows:,} should be")


def _read_ipc(pyarrow: Any, opened: Any, file: Path, field: str) -> Iterator[tuple[float | None, Any]]:
    """Batches of one column, and the share of the file read so far."""
    ipc = need("pyarrow.ipc")
    is_file = opened.read(6) == b"ARROW1"
    opened.seek(0)
    open_ = ipc.open_file if is_file else ipc.open_stream
    schema = open_(opened).schema
    _check_column(pyarrow, file, schema, field)
    # Other columns are not even looked at.
    options = ipc.IpcReadOptions(included_fields=[schema.get_field_index(field)])
    opened.seek(0)
    table = open_(opened, options=options)
    if is_file:
        for i in range(table.num_record_batches):
            yield (i + 1) / table.num_record_batches, table.get_batch(i)
    else:
        size = max(opened.size(), 1)
        for batch in table:
            yield opened.tell() / size, batch


def _check_column(pyarrow: Any, file: Path, schema: Any, field: str) -> None:
    known = schema.names
    if known.count(field) != 1:
        why = "is there twice" if field in known else "is not there"
        raise DataError(f"{file}: column {field!r} {why}: set field to one of {join_names(known)}")
    found = schema.field(field).type
    values = found.value_type if pyarrow.types.is_dictionary(found) else found
    if str(values) not in ("string", "large_string", "string_view"):
        raise DataError(f"{file}: column {field!r} is {found}, not text: set field to one of {join_names(known)}")


def _texts(pyarrow: Any, array: Any) -> list[bytes | None]:
    """Values of a column as bytes: a row that is not UTF-8 must not take the others with it."""
    binary = {"string": pyarrow.binary(), "large_string": pyarrow.large_binary(), "string_view": pyarrow.binary_view()}
    if pyarrow.types.is_dictionary(array.type):
        values = array.dictionary.view(binary[str(array.type.value_type)])
        values.validate(full=True)
        array.indices.validate(full=True)
        # Refuses an index beyond the end.
        array = pyarrow.DictionaryArray.from_arrays(array.indices, values).dictionary_decode()
    else:
        array = array.view(binary[str(array.type)])
    array.validate(full=True)
    return array.to_pylist()
