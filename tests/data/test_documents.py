"""Every format gives the same documents, and every kind of damage is reported with file and line."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tli_jax.cli.train_config import TrainConfig
from tli_jax.data.decompress import CHUNK
from tli_jax.data.documents import Documents, read_plain
from tli_jax.data.formats import need
from tli_jax.data.records import read_json, split, universal_newlines
from tli_jax.errors import DataError, MissingInputError, UsageError

FORMATS = [
    "a.txt",
    "a.txt.gz",
    "a.txt.zst",
    "a.jsonl",
    "a.jsonl.gz",
    "a.jsonl.zst",
    "a.txt.xz",
    "a.txt.bz2",
    "a.jsonl.xz",
    "a.lines.json",
    "a.lines.json.gz",
    "a.array.json",
    "a.array.json.gz",
    "a.csv",
    "a.csv.gz",
    "a.tsv",
    "a.tsv.xz",
    "a.parquet",
    "a.view.parquet",
    "a.dictionary.parquet",
    "a.stream.arrow",
    "a.view.stream.arrow",
    "a.dictionary.stream.arrow",
    "a.zstd.stream.arrow",
    "a.file.arrow",
    "a.dictionary.zstd.feather",
    "a.view.file.arrow",
    "a.array_record",
    "a.json.arrayrecord",
    "dataset",
    "dataset_dict",
]


def read(path, **keys):
    documents = Documents(path, TrainConfig(**keys))
    return list(documents), documents


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(name, write, documents):
    got, found = read(write(name, documents), separator="<>")
    if ".txt" in name:
        documents = [text.replace("\r\n", "\n") for text in documents]
    assert got == documents and not found.notes
    assert found.count == len(documents) and found.done == found.nbytes and not found.bad


def test_folder_is_read_in_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b.txt", ".hidden", ".git/x", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if "json" in name else name)
    assert read(tmp_path)[0] == ["a/b.txt", "a/z.txt", "b.txt", "c.jsonl"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", b"one"),
        ("a.jsonl", b'{"text": "one"}'),
        ("a.json", b'[{"text": "one"}]'),
        ("a.csv", b"text\none\n"),
        ("b.csv", b'"text"\r\n"one"\r\n'),
    ],
)
def test_byte_order_mark_is_dropped(name, data, tmp_path):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data)
    assert read(tmp_path / name)[0] == ["one"]


@given(st.lists(st.text("a\r\n", max_size=5)))
def test_newlines_equal_those_of_text_mode(chunks):
    expected = io.TextIOWrapper(io.BytesIO("".join(chunks).encode()), encoding="utf-8").read()
    assert b"".join(universal_newlines(chunk.encode() for chunk in chunks)).decode() == expected


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n"])
def test_windows_newlines_separate_the_same_documents(separator, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n\r\n")
    got, found = read(tmp_path / "a.txt", separator=separator)
    assert got == ["one\ntwo", "three"] and not found.notes


def test_separator_that_never_occurs_is_noted(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert read(tmp_path / "a.txt", separator="\n\n")[1].notes == [
        r"separator '\n\n' never occurs, so it is one document"
    ]
    (tmp_path / "b.txt").write_text("three\n\nfour")
    assert not read(tmp_path, separator="\n\n")[1].notes


@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9)), max_size=5), st.integers(1, 40), st.booleans()
)
def test_json_array_is_parsed_in_any_chunks(items, size, is_indented):
    data = json.dumps(items, ensure_ascii=False, indent=2 if is_indented else None).encode()
    chunks = (data[i : i + size] for i in range(0, len(data), size))
    got = list(read_json(chunks))
    assert [record.content for record in got] == items
    if is_indented:
        lines = data.decode().split("\n")
        assert all(lines[record.number - 1].strip().startswith("{") for record in got)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"text": "one"}, {"text": "tw', "broken file"),
        (b'[{"text": "one"}', "broken file"),
        (b'[{"text": "one"} {"text": "two"}]', "broken file (line 1: the array does not end)"),
        (b'[{"text": "one"},\n]', "broken file (line 2 is not JSON"),
        (b'[{"text": "one"}] more', "broken file (line 1: more text after the end"),
        (b'[{"text": "one"},\n"two"]', "line 2: not a JSON object"),
        (b'[{"text": "one"},\nnull]', "line 2: not a JSON object"),
        (b'[{"text": "one"},\n{"text": "\\ud800"}]', "line 2: lone surrogate"),
        (b'[{"text": "one"},\n{"txt": ""}]', "line 2: no field 'text', did you mean txt?"),
        (b'[{"text": "one"}, ' + b"[" * 100_000, "broken file"),
    ],
)
def test_bad_array_is_refused_or_gives_the_items_before(data, message, tmp_path):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError) as refused:
        read(tmp_path / "a.json")
    assert message in str(refused.value)
    got, found = read(tmp_path / "a.json", on_bad="skip")
    assert got == ["one"] and found.bad.total() == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"text,n\none,1\ntwo\n", "line 3: 1 cells under 2 columns"),
        (b'text,n\none,1\n"two\nthree,2\n', "after line 2: broken file (unexpected end of data)"),
        (b'text,n\none,1\n"two" x,2\n', "after line 2: broken file"),
        (b"text,n\none,1\n\ntw\xffo,2\n", "line 4: not UTF-8"),
        (b"text,n\none,1\ntw\0o,2\n", "line 3: NUL character"),
    ],
)
def test_bad_csv_row_is_refused_or_skipped(data, message, tmp_path):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(DataError) as refused:
        read(tmp_path / "a.csv")
    assert message in str(refused.value)
    assert read(tmp_path / "a.csv", on_bad="skip")[0] == ["one"]


@pytest.mark.parametrize(
    ("header", "why"),
    [("story,label", "does not exist: set field to one of story, label"), ("text,text", "appears twice")],
)
def test_table_without_the_column_is_refused(header, why, tmp_path):
    (tmp_path / "a.csv").write_text(f"{header}\none,two\n")
    with pytest.raises(DataError, match=why):
        read(tmp_path / "a.csv", on_bad="skip")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PAGE = b"\n<!DOCTYPE html>\n<html><body>not found</body></html>"
WRONG = [
    ("a.txt", gzip.compress(b"one"), "is gzip data"),
    ("a.jsonl", POINTER, "is a Git LFS pointer"),
    ("a.parquet", POINTER, "is a Git LFS pointer"),
    ("a.arrow", PAGE, "is an HTML page"),
    ("a.csv", PAGE, "is an HTML page"),
    ("a.txt", b"\xef\xbb\xbf" + PAGE, "is an HTML page"),
    ("a.txt", "one".encode("utf-16"), "is UTF-16 text"),
    ("a.txt", b"PK\x03\x04...", "is a zip archive"),
    ("a.json", lzma.compress(b"{}"), "is xz data"),
    ("corpus", bz2.compress(b"one"), "is bzip2 data"),
    ("a.txt.gz", gzip.compress(b"one.txt".ljust(257, b"\0") + b"ustar"), "holds a tar archive"),
    ("a.txt.gz", gzip.compress(gzip.compress(b"one")), "holds gzip data"),
    ("a.jsonl.xz", lzma.compress(POINTER), "holds a Git LFS pointer"),
]


@pytest.mark.parametrize(("name", "data", "message"), WRONG, ids=[f"{one[0]} {one[2]}" for one in WRONG])
def test_content_that_contradicts_the_name_is_described(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)
    with pytest.raises(DataError, match="no document"):
        read(tmp_path / name, on_bad="skip")


@pytest.mark.parametrize("source", ["a.parquet", "a.file.arrow", "a.stream.arrow"])
def test_table_is_recognized_by_content_unless_the_name_contradicts(source, write, documents):
    path = write(source, documents)
    assert read(path.rename(path.with_name("part-00000")))[0] == documents
    path.with_name("part-00000").rename(path.with_name("a.txt"))
    with pytest.raises(DataError, match=r"is (Parquet|an Arrow)"):
        read(path.with_name("a.txt"))


def test_read_plain(tmp_path, write):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfone\r\ntwo\n"))
    assert read_plain(tmp_path / "a.txt.gz") == "one\ntwo\n"
    with pytest.raises(DataError, match="is json by its name: give plain text"):
        read_plain(write("a.jsonl", ["one"]))
    (tmp_path / "b.txt").write_bytes(POINTER)
    with pytest.raises(DataError, match="pointer"):
        read_plain(tmp_path / "b.txt")
    with pytest.raises(MissingInputError, match="no such text file"):
        read_plain(tmp_path)


@given(st.lists(st.binary(max_size=9)), st.binary(min_size=1, max_size=3))
def test_splitting_chunks_equals_splitting_the_text(chunks, separator):
    parts = b"".join(chunks).split(separator)
    assert [part for _, part in split(iter(chunks), separator)] == (parts if parts[-1] else parts[:-1])


@given(st.lists(st.text("a\n<>", max_size=7)))
def test_parts_are_numbered_by_line(chunks):
    text, at = "".join(chunks), 0
    for line, part in split(iter([chunk.encode() for chunk in chunks]), b"<>"):
        assert line == 1 + text.count("\n", 0, at)
        at += len(part) + 2


BAD_TEXT = [
    (b"one\ntwo<>th\nr\xffee<>four", "line 3", "not UTF-8"),
    (b"one\ntwo<>th\n\nr\0ee<>four", "line 4", "NUL character"),
]
BAD_ROWS = [
    (b'{"text": "tw', "not JSON"),
    (b'["two"]', "not a JSON object"),
    (b'{"txt": "two"}', "no field 'text', did you mean txt?"),
    (b'{"text": 2}', "field 'text' is not text"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "a\\n\\u0000"}', "NUL character"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
    (b"[" * 100_000, "not JSON"),
]
BAD = [("a.txt", *one) for one in BAD_TEXT] + [
    ("a.jsonl", b'{"text": "one"}\n\n' + row + b'\n{"text": "four"}\n', "line 3", reason) for row, reason in BAD_ROWS
]


@pytest.mark.parametrize(("name", "data", "place", "reason"), BAD)
def test_bad_document_is_refused_or_counted_with_its_line(name, data, place, reason, tmp_path):
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(DataError) as refused:
        read(file, separator="<>")
    assert str(refused.value).startswith(f"{file}: {place}: {reason}: fix it")
    got, found = read(file, separator="<>", on_bad="skip")
    assert got in (["one", "four"], ["one\ntwo", "four"])
    assert found.bad == {reason: 1} and found.places == [f"{file}: {place}"]


def test_all_bad_documents_are_counted_and_the_first_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("nonsense\n" * 7 + '{"text": "one"}')
    _, found = read(tmp_path / "a.jsonl", on_bad="skip")
    assert found.bad == {"not JSON": 7} and len(found.places) == 5


@pytest.fixture(scope="session")
def many():
    """Texts that compress badly, so that truncation anywhere leaves some complete."""
    rng = np.random.default_rng(0)
    return [f"{i} {rng.bytes(400).hex()}" for i in range(6000)]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_compressed_file_gives_the_documents_before(name, write, many):
    path = write(name, many)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(DataError, match=r"after line \d+ of the decompressed text: broken file \(.+\): fix it"):
        read(path, separator="<>")
    got, found = read(path, separator="<>", on_bad="skip")
    assert len(many) // 2 < len(got) < len(many) and got == many[: len(got)]
    assert found.bad == {"broken file": 1}


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_damaged_compressed_file_is_refused(name, write, many):
    path = write(name, many)
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 255
    for damaged in (data, b"certainly not compressed"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="broken file"):
            read(path, separator="<>")
    with pytest.raises(DataError, match="no document"):
        read(path, separator="<>", on_bad="skip")


@pytest.mark.parametrize("name", ["a.parquet", "a.array_record"])
def test_truncated_file_of_a_format_with_a_footer_is_refused(name, write, documents):
    path = write(name, documents * 50)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="after record 0: broken file"):
        read(path)
    with pytest.raises(DataError, match="no document"):
        read(path, on_bad="skip")


def test_damaged_parquet_file_gives_the_rows_before(write):
    path = write("a.parquet", [np.random.default_rng(i).bytes(40).hex() for i in range(9000)])
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"after record \d+: broken file"):
        read(path)
    got, found = read(path, on_bad="skip")
    assert 0 < len(got) < 9000 and found.bad == {"broken file": 1}


def test_bad_parquet_row_does_not_spoil_the_others(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pa.array([b"one", None, b"\xff", b"a\0", b"five"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    got, found = read(tmp_path / "a.parquet", on_bad="skip")
    assert got == ["one", "five"] and found.bad == {"null": 1, "not UTF-8": 1, "NUL character": 1}
    assert [place.split(": ")[1] for place in found.places] == ["record 2", "record 3", "record 4"]
    with pytest.raises(DataError, match="column 'story' does not exist: set field to one of text"):
        read(tmp_path / "a.parquet", field="story", on_bad="skip")


@pytest.mark.parametrize("name", ["a.stream.arrow", "a.file.arrow", "a.dictionary.stream.arrow", "a.view.stream.arrow"])
def test_flipped_bits_in_an_arrow_file_never_crash(name, write):
    """Flips a bit of each byte, in a subprocess. The text may change, but no foreign memory is returned."""
    path = write(name, ["one two three, and more than twelve bytes", "four"])
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", FLIP, str(path)], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr[-500:]
    counts = json.loads(found.stdout)
    assert counts["refused"] > 30 and counts["read"] > 30 and counts["wrong"] == []


# Every text read is part of the true texts, apart from one character.
FLIP = """
import json, pathlib, sys
from tli_jax.cli.train_config import TrainConfig
from tli_jax.data.documents import Documents
from tli_jax.errors import DataError

def is_near(text):
    starts = range(len(true) - len(text) + 1)
    return any(sum(a != b for a, b in zip(text, true[i:])) <= 1 for i in starts)

path = pathlib.Path(sys.argv[1])
original = path.read_bytes()
true = "".join(Documents(path, TrainConfig()))
counts = {"refused": 0, "read": 0, "wrong": []}
for at in range(len(original)):
    data = bytearray(original)
    data[at] ^= 1 << at * 5 % 8
    path.write_bytes(data)
    try:
        found = list(Documents(path, TrainConfig()))
    except DataError:
        counts["refused"] += 1
        continue
    counts["read"] += 1
    if not all(is_near(text) for text in found):
        counts["wrong"].append((at, found))
print(json.dumps(counts))
"""


def test_array_record_text_may_start_with_a_brace(write):
    path = write("a.array_record", ["{not json", '{"text": "one"}', '{"other": 1}'])
    got, found = read(path, on_bad="skip")
    assert got == ["{not json", "one"] and found.bad == {"no field 'text'": 1}


def test_empty_documents_are_counted_and_empty_files_are_bad(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n \ntwo\n")
    got, found = read(tmp_path, separator="\n")
    assert got == ["one", "two"] and found.empty == 2
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(DataError, match=r"b\.txt: empty file"):
        read(tmp_path, separator="\n")
    assert read(tmp_path, separator="\n", on_bad="skip")[1].bad == {"empty file": 1}
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="no document contains text"):
        read(tmp_path, on_bad="skip")


def test_missing_files_and_libraries_are_named(tmp_path, write):
    with pytest.raises(MissingInputError, match="no such file or folder"):
        read(tmp_path / "nothing")
    with pytest.raises(DataError, match="contains no text files"):
        read(tmp_path)
    with pytest.raises(UsageError, match=r"needs nosuchthing: pip install nosuchthing"):
        need("nosuchthing.inner")
    folder = write("dataset_dict", ["one"])
    (folder / "train").rename(folder / "dev")
    with pytest.raises(DataError, match="has no training split, only test, validation"):
        read(folder)


def test_datasets_folder_must_list_its_own_files(write):
    folder = write("dataset", ["one", "two"])
    state = json.loads((folder / "state.json").read_text())
    shard = state["_data_files"][1]["filename"]
    (folder / shard).unlink()
    with pytest.raises(MissingInputError, match=r"is listed in state\.json"):
        read(folder)
    state["_data_files"][1]["filename"] = "../elsewhere.arrow"
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="does not list"):
        read(folder)


def test_token_ids_among_texts_and_compressed_parquet_are_refused(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(9))
    with pytest.raises(DataError, match="as a source of its own"):
        read(tmp_path)
    (tmp_path / "ids.npy").rename(tmp_path / "a.parquet.gz")
    with pytest.raises(DataError, match="decompress it"):
        read(tmp_path)


def test_long_line_is_read_in_linear_time(tmp_path):
    line = b"word " * (CHUNK * 40 // 5)
    with gzip.open(tmp_path / "a.txt.gz", "wb", compresslevel=1) as file:
        file.write(line)
    got, _ = read(tmp_path / "a.txt.gz", separator="\n")
    assert [len(one) for one in got] == [len(line)]
