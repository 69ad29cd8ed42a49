"""Which files of a folder are read, and which are reported as skipped."""

import json
import os
from pathlib import Path

import pytest

from tli_jax.cli.train_config import TrainConfig
from tli_jax.data.documents import Documents
from tli_jax.data.sources import find_files
from tli_jax.errors import DataError, MissingInputError


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) if ".json" in name else name, encoding="utf-8")
    return folder


def find(folder: Path) -> tuple[list[str], str]:
    found = find_files(folder)
    return [file.relative_to(folder).as_posix() for file in found.files], "\n".join(found.notes)


def test_files_that_are_not_text_are_skipped_and_listed(tmp_path):
    beside = [
        "README.md",
        "LICENSE",
        "LICENSE.txt",
        "dataset_infos.json",
        "photo.png",
        "code/load.py",
        ".gitattributes",
    ]
    beside += [".git/config", ".git/HEAD", "tokenizer.json", "data/requirements.txt"]
    make(tmp_path, "a.txt", "b.jsonl", "data/c.JSONL", "config.txt", "d.csv.gz", *beside)
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    files, note = find(tmp_path)
    assert files == ["a.txt", "b.jsonl", "config.txt", "d.csv.gz", "data/c.JSONL"]
    assert note.startswith(
        f"{tmp_path}: skips hidden files, linked folders and files that are not text: .git/, .gitattributes"
    )
    assert note.endswith("and 4 more")
    with pytest.raises(DataError, match=r"contains no text files, only load\.py: give the files"):
        find(tmp_path / "code")


SPLITS = [
    (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], ["data/test-00000-of-00001.parquet"]),
    (["train.jsonl"], ["validation.jsonl", "test.jsonl"]),
    (["en/train.jsonl", "de/train.jsonl"], ["en/dev.jsonl", "de/test.jsonl"]),
    (["train/a.txt", "train/b.txt"], ["test/a.txt", "val/c.txt", "valid/d.txt"]),
    (["train/part-0.txt"], ["test/train.txt"]),
    (["ratings_train.txt"], ["ratings_test.txt", "ratings.txt"]),
    (["c4-train.00000-of-00512.json.gz", "c4-train.00001-of-00512.json.gz"], ["c4-validation.00000-of-00008.json.gz"]),
    (["train_sft-00000-of-00003.parquet", "train_gen-00000-of-00003.parquet"], ["test_sft-00000-of-00001.parquet"]),
    (["train-00000-of-00001.parquet"], ["unsupervised-00000-of-00001.parquet", "test-00000-of-00001.parquet"]),
    (["wiki.train.txt"], ["wiki.valid.txt", "wiki.test.txt"]),
    (["a.txt", "b.txt"], ["test.txt"]),
    (["the-train-robbery.txt", "Trainspotting.txt", "latest.txt"], []),
    (["c4-train.00000-of-00512.json.gz", "c4-train.00001-of-00512.json.gz"], []),
]


@pytest.mark.parametrize(("read", "left_out"), SPLITS, ids=lambda names: str(names)[:40])
def test_only_the_training_split_is_read(read, left_out, tmp_path):
    files, note = find(make(tmp_path, *read, *left_out))
    assert files == sorted(read)
    assert bool(note) == bool(left_out)
    if left_out and read != ["a.txt", "b.txt"]:
        assert "reads the split train" in note and ("test" in note or "validation" in note)


def test_title_is_not_a_split(tmp_path):
    files, note = find(make(tmp_path, "test-drive.txt", "the-train-robbery.txt"))
    assert len(files) == 2 and "may mean an evaluation split: test-drive.txt" in note


def test_another_split_is_read_if_given_by_itself(tmp_path):
    make(tmp_path, "data/train-0.txt", "data/test-0.txt", "test/x.txt")
    assert find_files(tmp_path / "data" / "test-0.txt").files == [tmp_path / "data" / "test-0.txt"]
    assert find(tmp_path / "test") == (["x.txt"], "")
    (tmp_path / "data" / "train-0.txt").unlink()
    with pytest.raises(DataError, match="has no training split, only test: give one of its files or folders"):
        find(tmp_path)


def test_saved_dataset_reads_the_files_that_it_lists(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")})
    made.save_to_disk(str(tmp_path / "parent" / "saved"))
    make(tmp_path / "parent" / "saved" / "train", "cache-0123.arrow")
    for folder in (tmp_path / "parent", tmp_path / "parent" / "saved"):
        assert list(Documents(folder, TrainConfig())) == ["train"]
        _, note = find(folder)
        assert "skips test (1 file)" in note and "cache-0123.arrow" in note and "dataset_dict.json" in note


def test_broken_links_and_devices_are_refused(tmp_path):
    (make(tmp_path, "a.txt") / "b.txt").symlink_to("nowhere")
    with pytest.raises(MissingInputError, match=r"b\.txt: broken link"):
        find(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(DataError, match="neither a file nor a folder"):
            find_files(path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(MissingInputError):
        find_files(tmp_path / "loop")
