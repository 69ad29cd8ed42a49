"""A source is tokenized once, into the ids of its documents, and damaged cache entries are rebuilt."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tli_jax.cli.train_config import TrainConfig
from tli_jax.data.stream import open_stream
from tli_jax.data.tokenization import Rules, split_document
from tli_jax.errors import DataError, MissingInputError


class CountingTokenizer:
    """One token per character. Counts its calls."""

    size = 1 << 20

    special_as_text = ("<|end|>",)

    def __init__(self):
        self.calls = 0

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def encode(self, text):
        self.calls += 1
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture
def rules():
    config = TrainConfig(separator="<>", on_bad="skip")
    return Rules(config, CountingTokenizer(), "digest", 60_000, bos=1, eos=2)


def ids(stream):
    return stream.read(0, len(stream))[0].tolist()


def starts(stream):
    return np.flatnonzero(stream.read(0, len(stream))[1]).tolist()


def test_documents_are_enclosed_in_bos_and_eos(write, rules, tmp_path):
    stream = open_stream(write("a.txt", ["ab", " ", "c\0", "d"]), rules, tmp_path / "cache")
    assert ids(stream) == [1, 97, 98, 2, 1, 100, 2] and stream.shards[0].ids.dtype == np.uint16
    path = tmp_path / "a.txt"
    assert stream.notes == (
        f"{path}: skipped 1 bad document (1 × NUL character): line 1",
        f"{path}: skipped 1 empty document",
    )


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_dtype_of_ids_follows_the_vocabulary(vocab_size, dtype, write, rules, tmp_path):
    rules = dataclasses.replace(rules, vocab_size=vocab_size, bos=65_535, eos=None)
    stream = open_stream(write("a.txt", ["ab"]), rules, tmp_path / "cache")
    assert stream.shards[0].ids.dtype == dtype and ids(stream) == [65_535, 97, 98]


def test_special_tokens_in_a_text_are_noted(write, rules, tmp_path):
    texts = ["a<|end|>b<|end|>", "<|end|>", "end"]
    stream = open_stream(write("a.jsonl", texts), rules, tmp_path / "cache")
    (note,) = stream.notes
    assert note.startswith(
        f"{tmp_path / 'a.jsonl'}: special tokens such as '<|end|>' occur at least 2 times and are read"
    )
    assert open_stream(tmp_path / "a.jsonl", rules, tmp_path / "cache").notes == (note,)


def test_cache_is_reused_only_for_the_same_key(write, rules, tmp_path):
    path, cache = write("a.txt", ["ab", "c\0"]), tmp_path / "cache"
    first = open_stream(path, rules, cache)
    calls = rules.tokenizer.calls
    again = open_stream(path, rules, cache)
    assert rules.tokenizer.calls == calls
    assert again.digest == first.digest and again.notes == first.notes
    assert ids(again) == ids(first)
    for other in (
        dataclasses.replace(rules, bos=None),
        dataclasses.replace(rules, tokenizer_digest="other"),
        dataclasses.replace(rules, vocab_size=70_000),
        dataclasses.replace(rules, config=dataclasses.replace(rules.config, separator="b")),
        dataclasses.replace(rules, config=dataclasses.replace(rules.config, special_tokens="parse")),
    ):
        open_stream(path, other, cache)
        assert rules.tokenizer.calls > calls
        calls = rules.tokenizer.calls
    path.write_text("ac")
    assert open_stream(path, rules, cache).digest != first.digest
    assert rules.tokenizer.calls > calls


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "record", "count", "nested", "no ids", "starts", "pipe", "terabyte"]
)
def test_damaged_cache_entry_is_rebuilt(damage, write, rules, tmp_path):
    path, cache = write("a.txt", ["abc"]), tmp_path / "cache"
    open_stream(path, rules, cache)
    (ids,), (record,) = cache.glob("*/*.ids"), cache.glob("*/*.json")
    data = ids.read_bytes()
    if damage == "record":
        record.write_text("{")
    elif damage == "count":
        record.write_text(record.read_text().replace('"documents": 1', '"documents": 2'))
    elif damage == "nested":
        record.write_text("[" * 100_000)
    elif damage == "terabyte":
        os.truncate(ids, 2**40)
    elif damage == "pipe":
        ids.unlink()
        os.mkfifo(ids)
    elif damage == "no ids":
        ids.unlink()
    elif damage == "starts":
        (file,) = cache.glob("*/*.starts")
        file.write_bytes(b"\1" + file.read_bytes()[1:])
    else:
        ids.write_bytes(data[:-2] if damage == "truncated" else data[:-1] + b"\7")
    assert starts(open_stream(path, rules, cache)) == [0]
    assert ids.read_bytes() == data and json.loads(record.read_text())["tokens"] == 5


def test_interrupted_tokenization_leaves_no_files(write, rules, tmp_path, monkeypatch):
    path, cache = write("a.txt", ["ab", "c"]), tmp_path / "cache"

    def stop(text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rules.tokenizer, "encode", stop)
        with pytest.raises(KeyboardInterrupt):
            open_stream(path, rules, cache)
    assert list(cache.iterdir()) == []
    assert len(open_stream(path, rules, cache)) == 7
    (entry,) = cache.iterdir()
    assert {file.name for file in entry.iterdir()} == {"00000.ids", "00000.starts", "manifest.json"}


def test_digest_depends_on_names_and_bytes_not_on_location(rules, tmp_path):
    digests = []
    for folder, name in (("a", "x.txt"), ("b", "x.txt"), ("c", "y.txt")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("text")
        digests.append(open_stream(tmp_path / folder, rules, tmp_path / "cache").digest)
    assert digests[0] == digests[1] != digests[2]


def test_digest_of_a_file_depends_on_its_suffix(rules, tmp_path):
    (tmp_path / "b").mkdir()
    places = [tmp_path / "x.txt", tmp_path / "b" / "y.txt", tmp_path / "x.jsonl"]
    for place in places:
        place.write_text('{"text": "ab"}')
    streams = [open_stream(place, rules, tmp_path / "cache") for place in places]
    assert streams[0].digest == streams[1].digest != streams[2].digest
    assert len(streams[0]) == len(streams[1]) > len(streams[2])


def test_deleted_source_is_read_from_the_cache(write, rules, tmp_path):
    path, cache = write("a.txt", ["ab", "c"]), tmp_path / "cache"
    first = open_stream(path, rules, cache)
    path.unlink()
    with pytest.raises(MissingInputError, match="no such file"):
        open_stream(path, rules, cache)
    again = open_stream(path, rules, cache, first.digest)
    assert again.digest == first.digest and "no longer exists" in again.notes[0]
    assert (ids(again), starts(again)) == (ids(first), [0, 4])
    (file,) = cache.glob("*/*.ids")
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(MissingInputError, match=r"its token ids, .*cache/\w+, are damaged: restore"):
        open_stream(path, rules, cache, first.digest)


def test_cache_that_was_checked_is_hashed_only_with_verify(write, rules, tmp_path):
    path, cache = write("a.txt", ["ab", "c"]), tmp_path / "cache"
    first = open_stream(path, rules, cache)
    (file,) = cache.glob("*/*.ids")
    intact = file.read_bytes()
    options = {"known_digest": first.digest, "is_checked": True}
    for damage, verify, is_found in ((b"\7", False, False), (b"\7", True, True), (b"", False, True)):
        file.write_bytes(intact[:-1] + damage)
        open_stream(path, rules, cache, **options, verify=verify)
        assert (file.read_bytes() == intact) == is_found
    path.write_text("changed")
    assert ids(open_stream(path, rules, cache, **options)) == [1, 97, 98, 2, 1, 99, 2]
    file.unlink()
    with pytest.raises(DataError, match="differs from the one that the first process reads"):
        open_stream(path, rules, cache, **options)
    np.save(tmp_path / "a.npy", np.arange(9))
    with pytest.raises(DataError, match="differs from the one"):
        open_stream(tmp_path / "a.npy", rules, cache, **options)


@pytest.mark.parametrize("is_line", [False, True])
def test_long_document_has_the_same_ids_in_pieces(is_line, tokenizer, model, text, tmp_path, write, monkeypatch):
    monkeypatch.setattr("tli_jax.data.tokenization._PIECE", 5000)
    document = (text * (300_000 // len(text))).replace("\n", " " if is_line else "\n")
    assert len(list(split_document(document, tokenizer.encode))) > 40
    rules = Rules(TrainConfig(), tokenizer, "digest", model.vocab_size, None, None)
    stream = open_stream(write("a.txt", [document]), rules, tmp_path / "cache")
    assert ids(stream) == tokenizer.encode(document)


def test_document_is_not_split_if_that_would_change_its_ids(rules, tmp_path, write, monkeypatch):
    monkeypatch.setattr("tli_jax.data.tokenization._PIECE", 100)
    monkeypatch.setattr("tli_jax.data.tokenization._CONTEXT", 10)
    encode = CountingTokenizer().encode
    monkeypatch.setattr(rules.tokenizer, "encode", lambda text: [9, *encode(text)])
    stream = open_stream(write("a.txt", ["word " * 100]), rules, tmp_path / "cache")
    assert ids(stream) == [1, 9, *encode("word " * 100), 2]


READ_LONG_LINE = """
import resource, sys
from pathlib import Path
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.cli.train_config import TrainConfig
from tli_jax.data.stream import open_stream
from tli_jax.data.tokenization import Rules
folder = hub.resolve("embedded")
model = open_checkpoint(folder).config
rules = Rules(TrainConfig(separator="\\n"), open_tokenizer(folder, model)[0], "", model.vocab_size, None, None)
ids = open_stream(Path(sys.argv[1]), rules, Path(sys.argv[2]))
print(len(ids), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.long
def test_line_of_100_mb_takes_less_than_3_gb(text, tmp_path):
    line = text.replace("\n", " ").encode()
    with (tmp_path / "a.txt").open("wb") as file:
        for _ in range(100_000_000 // len(line)):
            file.write(line)
    command = [sys.executable, "-c", READ_LONG_LINE, str(tmp_path / "a.txt"), str(tmp_path / "cache")]
    tokens, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(tokens) > 30_000_000 and int(peak) < 3e9


def test_npy_is_used_directly(rules, tmp_path):
    file, cache = tmp_path / "a.npy", tmp_path / "cache"
    for dtype in (np.uint16, np.int32, np.int64):
        np.save(file, np.arange(100, dtype=dtype))
        (shard,) = open_stream(file, dataclasses.replace(rules, tokenizer=None), cache).shards
        assert isinstance(shard.ids, np.memmap) and shard.ids.dtype == dtype and not cache.exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(6).reshape(2, 3), r"is int64 \[2, 3\], must be a one-dimensional array"),
        (np.zeros(3), "is float64"),
        (np.zeros(0, np.int32), "must be a one-dimensional array"),
        (np.array([1, 2, 60_000]), "id 60000 at position 2, the model's vocabulary has 60,000"),
        (np.array([1, -2]), "id -2 at position 1"),
        (np.array([None]), "cannot be read"),
    ],
)
def test_npy_that_does_not_hold_ids_is_refused(array, message, rules, tmp_path):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        open_stream(tmp_path / "a.npy", rules, tmp_path)


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x93NUMPY\1\0", b"\x93NUMPY\1\0\x04\0({[ "])
def test_damaged_npy_is_refused(data, rules, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100))
    whole = (tmp_path / "a.npy").read_bytes()
    for broken in (data, whole[:-9]):
        (tmp_path / "a.npy").write_bytes(broken)
        with pytest.raises(DataError, match="cannot be read"):
            open_stream(tmp_path / "a.npy", rules, tmp_path)


def test_text_needs_a_tokenizer(write, rules, tmp_path):
    with pytest.raises(DataError, match="no tokenizer"):
        open_stream(write("a.txt", ["ab"]), dataclasses.replace(rules, tokenizer=None), tmp_path / "cache")
