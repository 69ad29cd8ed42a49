"""Prepared data equals the text it was made from, in any number of processes and shards, and damage is named."""

import dataclasses
import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tli_jax import prepare
from tli_jax.cli.frame import run_command
from tli_jax.cli.train_config import TrainConfig
from tli_jax.cli.values import Source
from tli_jax.data.batches import open_data, open_evaluation_data
from tli_jax.data.shards import Writer
from tli_jax.data.stream import estimate_tokens, open_stream
from tli_jax.data.tokenization import Rules
from tli_jax.errors import DataError, MissingInputError, UsageError
from tli_jax.hf import hub
from tli_jax.hf.tokenizer import tokenizer_digest

T = 16
ROOT = Path(__file__).parents[2]


def call(text, output, *flags):
    return run_command(prepare.main, ["--model=embedded", f"--text={text}", f"--output={output}", *map(str, flags)])


@pytest.fixture(scope="session")
def folder(once, text) -> Path:
    """``corpus``, and ``one`` and ``two``: prepared from it by one and by two processes in shards of 2,500 tokens."""

    def make(folder: Path) -> None:
        corpus = folder / "corpus"
        corpus.mkdir()
        lines = [text[i : i + 1 + i % 400] for i in range(0, 12_000, 200)] + ["", "end <|endoftext|>"]
        rows = [json.dumps({"text": line}) + "\n" for line in lines]
        (corpus / "a.jsonl").write_text("".join(rows[:20]))
        (corpus / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows[20:]).encode()))
        (corpus / "c.txt").write_text(text * (700_000 // len(text)))  # several batches, and a document of many pieces
        (corpus / "README.md").write_text("not read")
        assert call(corpus, folder / "one", "--workers=1") == 0
        assert call(corpus, folder / "two", "--workers=2", "--max-shard-size=5KB") == 0

    return once("prepared", make)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A copy of the folder in one shard."""
    return shutil.copytree(folder / "one", tmp_path / "copy")


@pytest.fixture
def opened(tmp_path, model, tokenizer):
    """Opens sources as a run with the embedded base does."""

    def opened(*paths, **keys):
        config = TrainConfig(text=tuple(Source(str(path)) for path in paths), **keys)
        digest = tokenizer_digest(hub.resolve("embedded"))
        return open_data(config, model, tokenizer, digest, T, tmp_path / "cache")

    return opened


@pytest.fixture
def rules(model, tokenizer):
    return Rules.of_model(TrainConfig(), model, tokenizer, tokenizer_digest(hub.resolve("embedded")))


def arrays(data):
    """All ids and starts, the held-out windows, and the first batches."""
    ((windows, _),) = data.training
    batches = itertools.islice(data.batches(3, 4, [2, 0], seed=5), 20)
    held_out = data.validation(2, range(2), 10)
    return [*windows.stream.read(0, len(windows.stream)), *(array for b in (*batches, *held_out) for array in b)]


def test_prepared_data_equals_the_text(folder, opened, tmp_path):
    plain = opened(folder / "corpus")
    for name in ("one", "two"):
        prepared = opened(folder / name)
        assert (prepared.digest, prepared.sources, prepared.tokens) == (plain.digest, plain.sources, plain.tokens)
        assert prepared.notes == (plain.notes[1].replace(str(folder / "corpus"), str(folder / name)),)
        for ours, theirs in zip(arrays(prepared), arrays(plain), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert not (folder / "one" / "00001.ids").exists() and len(list((folder / "two").glob("*.ids"))) > 100
    # The cache of the text holds the same files.
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    for file in ("00000.ids", "00000.starts"):
        assert (entry / file).read_bytes() == (folder / "one" / file).read_bytes()


def test_the_files_do_not_depend_on_the_number_of_processes(folder, tmp_path):
    assert call(folder / "corpus", tmp_path / "three", "--workers=3") == 0
    for file in (folder / "one").iterdir():
        assert (tmp_path / "three" / file.name).read_bytes() == file.read_bytes()


def test_windows_cross_shards(folder, opened):
    one, two = (opened(folder / name, validation_fraction=0).training[0][0] for name in ("one", "two"))
    for i in range(0, len(one), 7):
        np.testing.assert_array_equal(one[i], two[i])
    part = dataclasses.replace(two, first=7, count=600)
    np.testing.assert_array_equal(part.targets(), dataclasses.replace(one, first=7, count=600).targets())


def test_sources_with_weights_validation_and_evaluation(folder, opened, model, tokenizer, tmp_path):
    def both(path):
        training = opened(path, folder / "corpus" / "a.jsonl", validation_text=(Source(str(path)),))
        digest, config = tokenizer_digest(hub.resolve("embedded")), TrainConfig()
        (measured,) = open_evaluation_data([path], config, model, tokenizer, digest, T, tmp_path / "cache", 9)
        return training, measured.sources, [windows[3].tolist() for windows in measured.held_out]

    (plain, *measured), (prepared, *measured_prepared) = both(folder / "corpus"), both(folder / "two")
    assert measured == measured_prepared
    for step in (0, 9):
        ours, theirs = (next(data.batches(step, 4, range(4), 0)) for data in (prepared, plain))
        np.testing.assert_array_equal(ours, theirs)


def test_several_texts_are_one_stream(folder, opened, rules, tmp_path):
    texts = [folder / "corpus" / "a.jsonl", folder / "corpus" / "b.jsonl.gz"]
    assert call(",".join(map(str, texts)), tmp_path / "both", "--workers=1", "--max-shard-size=1KB") == 0
    separate = [open_stream(path, rules, tmp_path / "cache") for path in texts]
    both = open_stream(tmp_path / "both", rules, tmp_path / "none")
    expected = [np.concatenate(parts) for parts in zip(*(s.read(0, len(s)) for s in separate), strict=True)]
    np.testing.assert_array_equal(both.read(0, len(both)), expected)
    assert both.digest not in [stream.digest for stream in separate] and not (tmp_path / "none").exists()
    assert estimate_tokens(tmp_path / "both", rules, 10) == len(both)


def test_a_document_without_tokens_keeps_its_start(rules, tmp_path):
    """Its start is that of the next document, also in the next batch and in the next shard."""
    batches = [([5, 6, 7], [0, 3]), ([], [0]), ([8, 9], [0, 2])]
    with Writer(tmp_path, rules, 3) as writer:
        for ids, starts in batches:
            writer.write(np.array(ids, np.uint16), np.array(starts, np.int64))
        writer.finish([{"path": "a", "digest": "a", "tokens": 5, "documents": 5}], {})
    found = [np.fromfile(tmp_path / f"{name}.starts", np.int64).tolist() for name in ("00000", "00001")]
    assert found == [[0], [0, 0, 0, 2]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer_digest": "0" * 64}, ["tokenizer 5", "(here 000000000000)"]),
        ({"bos": None}, ["bos 0 (here None)"]),
        ({"config": TrainConfig(separator="\n", field="story")}, ["separator None (here '\\n')", "field 'text' (here"]),
        ({"vocab_size": 70_000}, ["dtype 'uint16' (here 'uint32')"]),
    ],
)
def test_other_rules_are_refused_by_name(changes, words, folder, rules, tmp_path):
    with pytest.raises(UsageError) as error:
        open_stream(folder / "one", dataclasses.replace(rules, **changes), tmp_path)
    assert all(word in str(error.value) for word in [str(folder / "one"), *words])


def test_a_smaller_vocabulary_is_refused(folder, rules, tmp_path):
    with pytest.raises(DataError, match=r"has the id 1,022, the model's vocabulary has 1,000"):
        open_stream(folder / "one", dataclasses.replace(rules, vocab_size=1000), tmp_path)


def edit(file, old, new):
    file.write_bytes(file.read_bytes().replace(old, new, 1))


def seal(folder, **changes):
    """Change a manifest, with the right checksum."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    from tli_jax.data.shards import sha256_json

    manifest["sha256"] = sha256_json({key: value for key, value in manifest.items() if key != "sha256"})
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda copy: (copy / "00000.ids").unlink(), MissingInputError, "00000.ids missing"),
        (lambda copy: os.truncate(copy / "00000.ids", 100), DataError, "00000.ids: has 100 bytes, must have"),
        (lambda copy: os.truncate(copy / "00000.starts", 2**20), DataError, "00000.starts: has 1,048,576 bytes, must"),
        (lambda copy: edit(copy / "manifest.json", b'"bos": 0', b'"bos": 1'), DataError, "manifest.json: has changed"),
        (lambda copy: os.truncate(copy / "manifest.json", 900), DataError, "manifest.json: is damaged"),
        (lambda copy: seal(copy, version=2), DataError, "version 2 of the format, not 1"),
        (lambda copy: seal(copy, shards=[{}]), DataError, "manifest.json: is damaged"),
        (lambda copy: (copy / "manifest.json").unlink(), DataError, "contains no text files, only 00000.ids"),
        (lambda copy: shutil.rmtree(copy), MissingInputError, "no such file or folder"),
    ],
)
def test_damage_is_named(damage, kind, words, copy, rules, tmp_path):
    damage(copy)
    with pytest.raises(kind) as error:
        open_stream(copy, rules, tmp_path / "cache")
    assert words in str(error.value) and str(copy) in str(error.value)


@pytest.mark.parametrize(("name", "at"), [("00000.ids", 31), ("00000.starts", 30)])
def test_a_flipped_bit_is_found_with_verify(name, at, copy, opened):
    content = bytearray((copy / name).read_bytes())
    content[at] ^= 0x40
    (copy / name).write_bytes(content)
    data = opened(copy)  # not looked at
    with pytest.raises(DataError, match=f"{name}: its content has changed"):
        opened(copy, verify=True)
    # The model has no such id, and a document cannot start there.
    with pytest.raises(DataError, match=r"copy: is damaged between tokens .* with --verify"):
        data.training[0][0].stream.read(0, len(data.training[0][0].stream))


def test_opening_reads_the_manifest_only():
    """100 GB of ids in sparse shards, opened by the benchmark in a process of its own."""
    script = ROOT / "benchmarks" / "open_data.py"
    words = [sys.executable, str(script), "--sizes", "100", "--workers", "--no-train"]
    (found,) = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)["opened"]
    assert (found["shards"], found["tokens"]) == (94, 50_000_000_000)
    assert found["bytes_read"] < 100_000 and found["resident_bytes"] < 10_000_000


@pytest.mark.parametrize(
    ("source", "output", "flags", "code", "words"),
    [
        ("corpus", "corpus/out", [], 2, "must not be the same folder, and neither may contain the other"),
        ("corpus", "corpus", ["--overwrite"], 2, "must not be the same folder"),
        ("one", "out", [], 2, "contains token ids already"),
        ("ids.npy", "out", [], 2, "contains token ids already"),
        ("missing", "out", [], 66, "no such file or folder"),
        ("corpus/c.txt", "one", [], 73, "exists and is not empty"),
        ("corpus/a.jsonl", "other", ["--overwrite"], 73, "is not a folder of prepared data"),
        ("corpus/a.jsonl", "out", ["--field=story"], 65, "no field 'story'"),
        ("corpus", "out", ["--max-shard-size=none"], 2, "max_shard_size 'none' is not a size"),
        ("", "out", [], 2, "text is not set"),
    ],
)
def test_what_cannot_be_prepared(source, output, flags, code, words, folder, tmp_path, capsys):
    for name in ("corpus", "one"):
        (tmp_path / name).symlink_to(folder / name)
    np.save(tmp_path / "ids.npy", np.arange(100))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("{}")
    before = sorted(tmp_path.iterdir())
    assert call(tmp_path / source if source else "", tmp_path / output, *flags) == code
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before


def test_prepared_data_is_replaced(folder, copy):
    assert call(folder / "corpus" / "a.jsonl", copy, "--overwrite", "--workers=1", "--bos", "--no-eos") == 0
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["documents"] == 18 and manifest["rules"]["eos"] is None


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    "case", ["SIGTERM", "SIGKILL", "SIGKILL to a process that tokenizes", "SIGKILL to both, while they return ids"]
)
def test_an_interruption_leaves_nothing(case, folder, tmp_path, text):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(text * (10_000_000 // len(text)))
    words = [
        sys.executable,
        "-m",
        "tli_jax.prepare",
        "--model=embedded",
        f"--text={corpus}",
        f"--output={tmp_path}/out",
    ]
    process = subprocess.Popen([*words, "--workers=2"], stderr=subprocess.PIPE, text=True)
    while not any(file.stat().st_size for file in tmp_path.glob(".out.partial-*/*/00000.ids")):
        assert process.poll() is None
        time.sleep(0.01)
    workers = [pid for pid in children(process.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 2
    if case == "SIGKILL to a process that tokenizes":
        os.kill(workers[0], signal.SIGKILL)
    elif case == "SIGKILL to both, while they return ids":
        process.send_signal(signal.SIGSTOP)  # nobody receives: more than a pipe holds would get stuck
        time.sleep(1)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        process.send_signal(signal.SIGCONT)
    else:
        process.send_signal(signal.Signals[case])
    try:
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    code, message = {"SIGTERM": (75, "stopped by SIGTERM"), "SIGKILL": (-9, "")}.get(case, (74, "use fewer --workers"))
    assert process.returncode == code and message in err and "Traceback" not in err
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "out").exists()
    assert call(folder / "corpus" / "a.jsonl", tmp_path / "out", "--workers=1") == 0
    assert not list(tmp_path.glob(".out*"))
