"""Write the tensors of an export to files, by all processes that share the file system of the output."""

import collections
import dataclasses
import itertools
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from tli_jax.distributed.processes import gather_json, is_first
from tli_jax.errors import StorageError
from tli_jax.hf.shards import OutputTensor, Progress, share_shards, write_files, write_index


def write_together(
    tensors: list[OutputTensor], max_shard_bytes: int, folder: Path | None, progress: Progress = lambda nbytes: None
) -> tuple[dict[str, str], float]:
    """Write safetensors files and their index. Every process must call this: all take part in making each tensor.

    A process that does not see the folder writes nothing. So without a shared file system, the first writes everything.

    Args:
        tensors: whose bytes come in one chunk.
        folder: in the first process, the folder to write to; None in the others.

    Returns:
        In the first process, the sha256 of every tensor by name, and the seconds spent on hashing its own.

    Raises:
        OSError: this process could not write.
        StorageError: another one could not.
    """
    folder, writers = _find_writers(folder)
    me = jax.process_index()
    shares = share_shards(tensors, max_shard_bytes, len(writers))
    # In each round, every writer gets one tensor, which it writes while the others write theirs.
    rounds = collections.deque(
        itertools.zip_longest(*([tensor for shard in share.values() for tensor in shard] for share in shares))
    )

    def next_round() -> Iterator[Any]:
        own: list[Any] = []
        for writer, tensor in zip(writers, rounds.popleft(), strict=True):
            if tensor is not None:
                chunks = list(tensor.chunks())
                own = chunks if writer == me else own
                progress(tensor.nbytes)
        return iter(own)

    files = shares[writers.index(me)] if me in writers else {}
    files = {name: [dataclasses.replace(tensor, make=next_round) for tensor in shard] for name, shard in files.items()}
    failure, digests, seconds = None, {}, 0.0
    try:
        digests, seconds = write_files(folder, files, {})
        if me in writers and not is_first():
            (folder / f"digests-{me}").write_text(json.dumps(digests), encoding="utf-8")
    except OSError as error:
        failure = error
    while rounds:  # the others need this process
        next_round()
    reasons = [one["failure"] for one in gather_json({"failure": failure and (failure.strerror or str(failure))})]
    if failure is not None:
        raise failure
    for process, reason in enumerate(reasons):
        if reason is not None:
            raise StorageError(f"{folder}: process {process} cannot write its files ({reason}): free space there")
    if is_first():
        for writer in writers[1:]:
            file = folder / f"digests-{writer}"
            digests |= json.loads(file.read_text(encoding="utf-8"))
            file.unlink()
        write_index(folder, {name: shard for share in shares for name, shard in share.items()})
    return digests, seconds


def _find_writers(folder: Path | None) -> tuple[Path, list[int]]:
    """The folder of the first process, and the processes that see in it what the first one writes."""
    token = secrets.token_hex(16)
    if folder is not None:
        (folder / "token").write_text(token)
    first = gather_json({"folder": str(folder), "token": token})[0]
    file = Path(first["folder"]) / "token"
    try:
        is_seen = file.read_text() == first["token"]
    except OSError:
        is_seen = False
    writers = [process for process, one in enumerate(gather_json({"is_seen": is_seen})) if one["is_seen"]]
    if folder is not None:
        file.unlink()
    return file.parent, writers
