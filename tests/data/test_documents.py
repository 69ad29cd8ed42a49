"""Every format gives the same documents, and every kind of damage is told with file and line."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tli_jax.config import TrainConfig
from tli_jax.data.documents import CHUNK, Documents, need, split
from tli_jax.errors import DataError, MissingInputError, UsageError

FORMATS = [
    "a.txt",
    "a.txt.gz",
    "a.txt.zst",
    "a.jsonl",
    "a.jsonl.gz",
    "a.jsonl.zst",
    "a.parquet",
    "a.array_record",
    "a.json.arrayrecord",
    "dataset",
    "dataset_dict",
]


def read(path, **keys):
    found = Documents(path, TrainConfig(**keys))
    return list(found), found


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(name, write, documents):
    got, found = read(write(name, documents), separator="<>")
    assert got == documents
    assert found.count == len(documents) and found.done == found.nbytes and not found.bad


def test_a_folder_is_its_files_in_order_without_hidden_ones(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b.txt", ".hidden", ".git/x", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if "json" in name else name)
    assert read(tmp_path)[0] == ["a/b.txt", "a/z.txt", "b.txt", "c.jsonl"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert read(tmp_path / "a.txt")[0] == ["one"]


@given(st.lists(st.binary(max_size=9)), st.binary(min_size=1, max_size=3))
def test_splitting_a_stream_is_splitting_the_whole(chunks, separator):
    whole = b"".join(chunks)
    parts = whole.split(separator)
    assert [part for _, part in split(iter(chunks), separator)] == (parts if parts[-1] else parts[:-1])


@given(st.lists(st.text("a\n<>", max_size=7)))
def test_a_part_knows_its_line(chunks):
    whole, at = "".join(chunks), 0
    for line, part in split(iter([chunk.encode() for chunk in chunks]), b"<>"):
        assert line == 1 + whole.count("\n", 0, at)
        at += len(part) + 2


BAD_TEXT = [
    (b"one\ntwo<>th\nr\xffee<>four", "line 3", "not UTF-8"),
    (b"one\ntwo<>th\n\nr\0ee<>four", "line 4", "NUL character"),
]
BAD_ROWS = [
    (b'{"text": "tw', "not JSON"),
    (b'["two"]', "not a JSON object"),
    (b'{"txt": "two"}', "no field 'text', is txt meant?"),
    (b'{"text": 2}', "field 'text' is not text"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "a\\n\\u0000"}', "NUL character"),
    (b'{"text": "\\ud800"}', "half a surrogate pair"),
    (b"[" * 100_000, "not JSON"),
]
BAD = [("a.txt", *one) for one in BAD_TEXT] + [
    ("a.jsonl", b'{"text": "one"}\n\n' + row + b'\n{"text": "four"}\n', "line 3", reason) for row, reason in BAD_ROWS
]


@pytest.mark.parametrize(("name", "data", "place", "reason"), BAD)
def test_a_bad_document_is_refused_or_counted_with_its_line(name, data, place, reason, tmp_path):
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(DataError) as refused:
        read(file, separator="<>")
    assert str(refused.value).startswith(f"{file}: {place}: {reason}: mend it")
    got, found = read(file, separator="<>", on_bad="skip")
    assert got in (["one", "four"], ["one\ntwo", "four"])
    assert found.bad == {reason: 1} and found.places == [f"{file}: {place}"]


def test_only_the_first_places_are_kept_and_all_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("nonsense\n" * 7 + '{"text": "one"}')
    _, found = read(tmp_path / "a.jsonl", on_bad="skip")
    assert found.bad == {"not JSON": 7} and len(found.places) == 5


@pytest.fixture(scope="session")
def many():
    """Texts that do not compress well, so that a cut anywhere leaves some whole."""
    draw = np.random.default_rng(0)
    return [f"{i} {draw.bytes(400).hex()}" for i in range(6000)]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_packed_file_that_is_cut_gives_what_came_before(name, write, many):
    path = write(name, many)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(DataError, match=r"after line \d+: broken file \(.+\): mend it"):
        read(path, separator="<>")
    got, found = read(path, separator="<>", on_bad="skip")
    assert len(many) // 2 < len(got) < len(many) and got == many[: len(got)]
    assert found.bad == {"broken file": 1}


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_a_packed_file_that_is_not_what_it_was_is_refused(name, write, many):
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
def test_a_cut_file_that_needs_its_end_is_refused(name, write, documents):
    path = write(name, documents * 50)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="after record 0: broken file"):
        read(path)
    with pytest.raises(DataError, match="no document"):
        read(path, on_bad="skip")


def test_damage_within_a_parquet_file_keeps_the_rows_before(write):
    path = write("a.parquet", [np.random.default_rng(i).bytes(40).hex() for i in range(9000)])
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"after record \d+: broken file"):
        read(path)
    got, found = read(path, on_bad="skip")
    assert 0 < len(got) < 9000 and found.bad == {"broken file": 1}


def test_a_parquet_row_is_bad_alone(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pa.array([b"one", None, b"\xff", b"a\0", b"five"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    got, found = read(tmp_path / "a.parquet", on_bad="skip")
    assert got == ["one", "five"] and found.bad == {"null": 1, "not UTF-8": 1, "NUL character": 1}
    assert [place.split(": ")[1] for place in found.places] == ["record 2", "record 3", "record 4"]
    with pytest.raises(DataError, match="column 'story' is not there: set field to one of text"):
        read(tmp_path / "a.parquet", field="story", on_bad="skip")


def test_array_record_text_may_begin_with_a_brace(write):
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
    with pytest.raises(DataError, match="no document with text"):
        read(tmp_path, on_bad="skip")


def test_what_is_not_there_is_said(tmp_path, write):
    with pytest.raises(MissingInputError, match="no such file or folder"):
        read(tmp_path / "nothing")
    with pytest.raises(DataError, match="has no files"):
        read(tmp_path)
    with pytest.raises(UsageError, match=r"needs nosuchthing: pip install 'tli_jax\[data\]'"):
        need("nosuchthing.inner")
    folder = write("dataset_dict", ["one"])
    (folder / "train").rename(folder / "dev")
    with pytest.raises(DataError, match="no split 'train', only dev, test"):
        read(folder)


def test_a_datasets_folder_must_list_files_of_its_own(write):
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


def test_token_ids_do_not_stand_among_texts_and_parquet_is_not_packed(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(9))
    with pytest.raises(DataError, match="source of its own"):
        read(tmp_path)
    (tmp_path / "ids.npy").rename(tmp_path / "a.parquet.gz")
    with pytest.raises(DataError, match="unpack it"):
        read(tmp_path)


def test_one_long_line_is_read_in_time_that_grows_with_it_alone(tmp_path):
    line = b"word " * (CHUNK * 40 // 5)
    with gzip.open(tmp_path / "a.txt.gz", "wb", compresslevel=1) as file:
        file.write(line)
    got, _ = read(tmp_path / "a.txt.gz", separator="\n")
    assert [len(one) for one in got] == [len(line)]
