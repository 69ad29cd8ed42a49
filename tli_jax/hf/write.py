"""Write a Hugging Face model folder: weights, configuration, sidecar files, records and model card."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tli_jax.cli.progress import progress
from tli_jax.hf import sidecar
from tli_jax.hf.output import staged
from tli_jax.hf.shards import OutputTensor, Progress, write_shards


@dataclasses.dataclass(frozen=True)
class ModelWriter:
    """A model folder that is being written: it has its weights, configuration and sidecar files."""

    folder: Path  # temporary
    digests: Mapping[str, str]  # sha256 of every tensor, by name
    seconds: Mapping[str, float]  # spent on ``write``, and on ``hash`` for tensors that are not copies

    def write_record(self, name: str, content: Mapping[str, Any]) -> None:
        sidecar.write_json(self.folder / name, content)

    def write_card(self, text: str) -> None:
        (self.folder / "README.md").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def write_model(
    output: Path,
    shards: Mapping[str, list[OutputTensor]],
    config: Mapping[str, Any],
    *,
    source: Path | None = None,
    overwrite: bool = False,
    copied_digests: Callable[[], Mapping[str, str]] = dict,
    write: Callable[[Path, Progress], tuple[Mapping[str, str], float]] | None = None,
    title: str | None = None,
) -> Iterator[ModelWriter]:
    """Write a model to a temporary folder, which replaces ``output``, synced, when the block succeeds.

    The block may add records and a card, or run the model. If anything fails, ``output`` is as it was.

    Args:
        shards: what each file holds, see ``split_shards``.
        config: the content of ``config.json``.
        source: a model folder whose tokenizer, generation, licence and notice files are copied.
        overwrite: replace an existing model folder.
        copied_digests: returns the sha256 of the copied tensors. Called once the output is claimed and has room.
        write: writes the shards instead of ``write_shards``, maybe in other files, and returns the same.
        title: of the progress display, which is off by default.

    Raises:
        OutputError, StorageError: see ``staged``.
    """
    nbytes = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    copied = {} if source is None else sidecar.allowed_files(source)
    with staged(output, nbytes + sum(file.stat().st_size for file in copied.values()), overwrite) as folder:
        digests = copied_digests()
        started = time.perf_counter()
        with contextlib.nullcontext(lambda _: None) if title is None else progress(title, nbytes) as advance:
            if write is None:
                written, hashing = write_shards(folder, shards, digests, advance)
            else:
                written, hashing = write(folder, advance)
        seconds = {"write": time.perf_counter() - started - hashing, "hash": hashing}
        sidecar.write_json(folder / "config.json", config)
        if source is not None:
            sidecar.copy_allowed(source, folder)
        yield ModelWriter(folder, written, seconds)
