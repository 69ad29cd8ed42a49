"""Unreadable texts are named with file and line, and are refused, or skipped and counted."""

import gzip
import json

import pytest

from tli_jax import evaluate
from tli_jax.cli.frame import run_command

GOOD = "One day, a girl named Lily went to the park. " * 40


def parquet(file):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": [GOOD] * 50}), file, row_group_size=10)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = b""
    file.write_bytes(content)


def rows(*lines):
    good = json.dumps({"text": GOOD}).encode()
    return lambda file: file.write_bytes(b"\n".join([good, *lines, good]) + b"\n")


# File name, function that writes it, expected location in the message, and whether anything remains after skipping.
CASES = {
    "bad UTF-8": ("a.txt", lambda file: file.write_bytes(GOOD.encode() + b"\n\xff\xfe"), "line 2", False),
    "bad UTF-8 in a row": ("a.jsonl", rows(b'{"text": "\xff"}'), "line 2", True),
    "NUL": ("a.txt", lambda file: file.write_bytes(GOOD.encode() + b"\n\0"), "line 2", False),
    "a broken row": ("a.jsonl", rows(b'{"text": '), "line 2", True),
    "a row without the field": ("a.jsonl", rows(b'{"words": "x"}'), "line 2", True),
    "a row that is not an object": ("a.jsonl", rows(b"17"), "line 2", True),
    "a lone surrogate": ("a.jsonl", rows(b'{"text": "\\ud800"}'), "line 2", True),
    "an empty file": ("a.txt", lambda file: file.touch(), "empty", False),
    "truncated gzip": ("a.jsonl.gz", lambda f: f.write_bytes(gzip.compress(GOOD.encode() * 99)[:-9]), "", False),
    "not gzip": ("a.txt.gz", lambda file: file.write_bytes(GOOD.encode()), "", False),
    "truncated parquet": ("a.parquet", parquet, "", False),
}


@pytest.mark.parametrize("case", CASES)
def test_unreadable_text_is_refused_or_skipped(case, tmp_path, capsys):
    name, make, place, has_more = CASES[case]
    file = tmp_path / name
    make(file)
    call = ["--model", "embedded", "--text", str(file), "--sequence-length", "64", "--limit", "1"]
    assert run_command(evaluate.main, call) == 65
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and str(file) in err and place in err
    assert run_command(evaluate.main, [*call, "--on-bad", "skip"]) == (0 if has_more else 65)
    lines = capsys.readouterr().err.splitlines()
    if has_more:
        assert any(f"{file}: skipped 1 bad document" in line and place in line for line in lines)
    else:
        assert lines[-1].startswith("error: ") and str(file) in lines[-1]


def test_skipped_documents_are_reported(tmp_path, capsys):
    rows(b'{"text": ', b'{"text": "\xff"}', b'{"words": 1}')(tmp_path / "a.jsonl")
    call = ["--model", "embedded", "--text", str(tmp_path / "a.jsonl"), "--sequence-length", "64", "--on-bad", "skip"]
    assert run_command(evaluate.main, [*call, "--dtypes", "compute=float32"]) == 0
    err = capsys.readouterr().err
    assert "a.jsonl" in err and "3" in err and "line 2" in err
