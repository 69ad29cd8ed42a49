"""Tokenize text once, in several processes, into a folder of shards that runs open without tokenizing again."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tli_jax.data.documents import Documents
from tli_jax.data.shards import FIRST_SHARD, Prepared, Writer
from tli_jax.data.sources import find_files
from tli_jax.data.stream import describe, digest_files, estimate_tokens
from tli_jax.data.tokenization import EncodeAll, Encoded, Piece, Rules, encode, tokenize
from tli_jax.errors import StorageError
from tli_jax.hf.output import staged
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.models.config import LlamaConfig

_BATCH = 2**18  # characters per task: 0.1 s of work, and up to 40 MB for each process
_SAMPLE = 2**20  # characters of each source that are tokenized to estimate the size of the output


def prepare(
    named: Sequence[tuple[str, Path]],
    rules: Rules,
    model: LlamaConfig,
    output: Path,
    *,
    workers: int,
    shard_bytes: int,
    overwrite: bool = False,
    facts: dict[str, Any],
) -> tuple[Prepared, list[str]]:
    """Tokenize sources, one after the other, into one stream. The content does not depend on ``workers``.

    Args:
        named: name of each source, for messages and the manifest, and where it is.
        model: configuration that comes with the tokenizer.
        workers: processes that tokenize. This process reads the text and writes the ids.
        shard_bytes: upper limit of the ids of a shard.
        facts: further content of the manifest.

    Returns:
        The prepared data, and one line for each thing that was skipped.

    Raises:
        MissingInputError, DataError, UsageError: see ``Documents``.
        OutputError, StorageError: see ``staged``.
    """
    found = [find_files(path) for _, path in named]
    nbytes = sum(estimate_tokens(path, rules, _SAMPLE) for _, path in named) * rules.dtype.itemsize
    limit = max(shard_bytes // rules.dtype.itemsize, 1)
    with (
        staged(output, nbytes, overwrite, FIRST_SHARD) as folder,
        # Beside the output, not in it.
        tempfile.TemporaryDirectory(prefix="ids-", dir=folder.parent) as results,
        _processes(rules, model, workers, Path(results)) as encode_all,
        Writer(folder, rules, limit) as writer,
    ):
        sources = []
        for (name, path), (files, _) in zip(named, found, strict=True):
            digest = digest_files(path, files)
            counts = tokenize(Documents(path, rules.config), rules, writer.write, encode_all, _BATCH)
            sources.append({"path": name, "digest": digest} | counts)
        writer.finish(sources, facts)
    notes = [note for source in found for note in source.notes]
    notes += [note for source in sources for note in describe(source["path"], source)]
    return Prepared.open(output, rules), notes


@contextlib.contextmanager
def _processes(rules: Rules, model: LlamaConfig, workers: int, results: Path) -> Iterator[EncodeAll]:
    """Processes that encode batches. Each opens the tokenizer itself, as it cannot be sent.

    They return ids in files in ``results``. One that is killed while it sends more than a pipe holds would leave half
    of it in the pipe, and the pool would wait for the rest forever.
    """
    assert rules.tokenizer is not None
    arguments = (dataclasses.replace(rules, tokenizer=None), rules.tokenizer.folder, model)
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, initializer=_start, initargs=arguments)

    def encode_all(batches: Iterable[list[Piece]]) -> Iterator[Encoded]:
        running: collections.deque[concurrent.futures.Future[Path]] = collections.deque()
        for batch in batches:
            running.append(pool.submit(_encode, batch, results))
            if len(running) > 2 * workers:  # all are busy, and as many batches wait
                yield _receive(running.popleft().result())
        while running:
            yield _receive(running.popleft().result())

    try:
        yield encode_all
    except concurrent.futures.BrokenExecutor:
        raise StorageError("a process that tokenizes was killed, perhaps for memory: use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_rules: Rules  # of this process


def _start(rules: Rules, folder: Path, model: LlamaConfig) -> None:
    """Prepare a process that tokenizes."""
    global _rules
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or the threads of all processes would compete
    tokenizer, _ = open_tokenizer(folder, model, rules.config.special_tokens == "parse")
    _rules = dataclasses.replace(rules, tokenizer=tokenizer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(batch: list[Piece], results: Path) -> Path:
    """Encode a batch into a new file."""
    encoded = encode(_rules, batch)
    descriptor, name = tempfile.mkstemp(dir=results)
    with os.fdopen(descriptor, "wb") as file:
        np.savez(file, ids=encoded.ids, starts=encoded.starts, special=json.dumps(encoded.special))
    return Path(name)


def _receive(file: Path) -> Encoded:
    """Read a file of ``_encode``, and delete it."""
    with np.load(file) as arrays:
        encoded = Encoded(arrays["ids"], arrays["starts"], json.loads(str(arrays["special"])))
    file.unlink()
    return encoded
