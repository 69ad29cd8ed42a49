"""Sources in every format, and data tokenized from them for the embedded model."""

import bz2
import csv
import dataclasses
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tli_jax.cli.train_config import TrainConfig
from tli_jax.cli.values import Source
from tli_jax.data.batches import Data, open_data
from tli_jax.data.embedded import embedded_text
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.encoding import Tokenizer
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.models.config import LlamaConfig

DOCUMENTS = ["One day, a girl\nnamed Lily.", "naïve 한국어 😀", "Three.\r\n", "x" * 3000, "The end"]


@pytest.fixture
def documents() -> list[str]:
    return list(DOCUMENTS)


def _array_record(file: Path, records: list[bytes]) -> None:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes texts in the format that the name implies. Returns the path."""

    def write(name: str, texts: list[Any], separator: str = "<>") -> Path:
        path = tmp_path / name
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        data = rows if ".jsonl" in name or ".lines.json" in name else separator.join(texts).encode()
        if ".array.json" in name:
            data = json.dumps([{"n": [n], "text": text} for n, text in enumerate(texts)], indent=1).encode()
        if ".csv" in name or ".tsv" in name:
            table = io.StringIO(newline="")
            csv.writer(table, "excel-tab" if ".tsv" in name else "excel").writerows(
                [("n", "text"), *(((n, text)) for n, text in enumerate(texts))]
            )
            data = table.getvalue().encode()
        if name.endswith((".parquet", ".arrow", ".feather")):
            pa, ipc = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.ipc")
            column = pa.array(texts, pa.string_view() if "view" in name else pa.string())
            column = column.dictionary_encode() if "dictionary" in name else column
            table = pa.table({"n": list(range(len(texts))), "text": column})
            if name.endswith(".parquet"):
                pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=2)
            else:
                new = ipc.new_stream if "stream" in name else ipc.new_file
                options = ipc.IpcWriteOptions(compression="zstd" if "zstd" in name else None)
                with new(str(path), table.schema, options=options) as writer:
                    writer.write_table(table, max_chunksize=2)
        elif name.endswith(".array_record"):
            _array_record(path, [text.encode() for text in texts])
        elif name.endswith(".json.arrayrecord"):
            _array_record(path, rows.splitlines())
        elif name.startswith("dataset"):
            datasets = pytest.importorskip("datasets")
            made = datasets.Dataset.from_dict({"text": texts})
            made = datasets.DatasetDict({"train": made, "test": made}) if name.endswith("dict") else made
            made.save_to_disk(str(path), num_shards=2) if not name.endswith("dict") else made.save_to_disk(str(path))
        elif name.endswith(".xz"):
            path.write_bytes(lzma.compress(data))
        elif name.endswith(".bz2"):
            path.write_bytes(bz2.compress(data))
        elif name.endswith(".gz"):
            path.write_bytes(gzip.compress(data))
        elif name.endswith(".zst"):
            zstandard = pytest.importorskip("zstandard")
            half = len(data) // 2  # two frames, as `cat a.zst b.zst` writes
            compress = zstandard.ZstdCompressor(write_checksum=True).compress  # as the zstd command does
            path.write_bytes(compress(data[:half]) + compress(data[half:]))
        else:
            path.write_bytes(data)
        return path

    return write


@pytest.fixture(scope="session")
def model() -> LlamaConfig:
    return open_checkpoint(hub.resolve("embedded")).config


@pytest.fixture(scope="session")
def tokenizer(model: LlamaConfig) -> Tokenizer:
    tokenizer, _ = open_tokenizer(hub.resolve("embedded"), model)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def text() -> str:
    return embedded_text()


@pytest.fixture
def opened(tmp_path: Path, model: LlamaConfig, tokenizer: Tokenizer) -> Callable[..., Data]:
    """Opens data from sources (paths, or paths with weights) and configuration keys."""

    def opened(*sources: Path | tuple[Path, float], T: int = 16, eos_ids: tuple[int, ...] | None = None, **keys: Any):
        pairs = (source if isinstance(source, tuple) else (source, 1.0) for source in sources)
        text = tuple(Source(str(path), weight) for path, weight in pairs)
        validation_text = tuple(Source(str(path)) for path in keys.pop("validation_text", ()))
        config = TrainConfig(text=text, validation_text=validation_text, **keys)
        shape = model if eos_ids is None else dataclasses.replace(model, eos_token_ids=eos_ids)
        return open_data(config, shape, tokenizer, "tokenizer", T, tmp_path / "cache")

    return opened
