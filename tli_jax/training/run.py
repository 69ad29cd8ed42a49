"""The folder of a run: what it was started with, so that going on is going on with the same, and its metrics.

::

    RUN/config.yaml      the configuration as resolved
    RUN/run.json         digests of model and data, versions
    RUN/growth.json      the plan, where the model was grown
    RUN/model/           configuration, tokenizer and notices of the model; its weights are in the checkpoints
    RUN/start/           the model, where it came from another run
    RUN/data/            the text as token ids
    RUN/metrics.jsonl    one object a step
    RUN/checkpoints/

A run in object storage has its checkpoints there alone. Its other files are worked on in a copy on this machine; what
another machine needs to go on (all but ``start`` and ``data``) is written there too.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.checkpoint import sidecar
from tli_jax.checkpoint.headers import read_json
from tli_jax.checkpoint.hf import Checkpoint, read_chunks
from tli_jax.config import TrainConfig, difference, from_yaml, to_yaml
from tli_jax.errors import OutputError, UnavailableError, UsageError

if TYPE_CHECKING:
    from etils import epath

# What may be another when a run is gone on with: how long, how it is saved and shown, and on what it runs.
MAY_CHANGE = (
    *("steps", "save_every", "keep", "validate_every", "validation_batches", "track"),
    # Where the text is. Whether it is the same is told by its digest.
    *("text", "validation_text"),
    *("run", "mesh", "distributed", "process", "export", "export_only", "max_shard_size", "overwrite"),
)
# What may be there of a start that came to nothing.
_BEFORE = {"lock", "model", "data", "start", "checkpoints", "run.json", "growth.json"}
_SAMPLE = 4096  # bytes of each tensor that tell one model from another


class RunFolder:
    """One run's folder. Only the first process writes to it, but for the checkpoints.

    Attributes:
        remote: where the run lies, if that is in object storage; ``path`` is then the copy on this machine.
    """

    def __init__(self, path: Path | str):
        """Raises UsageError: an address that is not of Google Cloud Storage."""
        self.path, self.remote = Path(path), _open_remote(path) if "://" in str(path) else None
        if self.remote is not None:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            self.path = cache / "tli_jax" / hashlib.sha256(str(self.remote).encode()).hexdigest()[:16]
        self.config, self.model = self.path / "config.yaml", self.path / "model"
        self.checkpoints, self.data = (self.remote or self.path) / "checkpoints", self.path / "data"

    def __str__(self) -> str:
        return str(self.remote or self.path)

    @property
    def is_begun(self) -> bool:
        return self.fetch()

    def fetch(self) -> bool:
        """Bring the copy of a remote run on this machine up to date, but for the metrics; whether the run has begun.

        Raises:
            UsageError, UnavailableError: what reaches object storage is not installed, or does not reach it.
        """
        if (remote := self.remote) is None:
            return self.config.is_file()
        self.path.mkdir(parents=True, exist_ok=True)
        # One process of this machine at a time.
        with (self.path / ".fetching").open("w") as held, reaching(remote):
            fcntl.flock(held, fcntl.LOCK_EX)
            if not (remote / "config.yaml").is_file():
                return False
            facts, here = (remote / "run.json").read_bytes(), self.path / "run.json"
            if not here.is_file() or here.read_bytes() != facts:  # the copy is of another run of this name, or half
                for old in [old for old in self.path.iterdir() if old.name not in ("data", "lock", ".fetching")]:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            self.model.mkdir(exist_ok=True)
            found = [file for depth in ("*", "*/*") for file in (remote / "model").glob(depth)]
            names = [file.relative_to(remote).as_posix() for file in found if file.is_file()]
            for name in (*names, "growth.json", "config.yaml", "run.json"):
                # Only the configuration ever changes.
                is_wanted = name == "config.yaml" or not (self.path / name).is_file()
                if is_wanted and (remote / name).is_file():
                    (self.path / name).parent.mkdir(exist_ok=True)
                    with replacing(self.path / name) as temporary:
                        temporary.write_bytes((remote / name).read_bytes())
        return True

    def mirror(self, *names: str) -> None:
        """Write files of the copy on this machine to where the run lies; each appears there whole or not at all.

        Raises:
            UnavailableError: object storage does not take them.
        """
        if self.remote is not None:
            with reaching(self.remote):
                for name in names:
                    (self.remote / name).parent.mkdir(parents=True, exist_ok=True)
                    (self.remote / name).write_bytes((self.path / name).read_bytes())

    def create(self) -> None:
        """Make the folder.

        Raises:
            OutputError: it cannot be made, or something else is in it.
            UsageError, UnavailableError: what reaches object storage is not installed, or does not reach it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A lock and half a start are no reason to refuse.
            names = self._names() - _BEFORE
            foreign = {name for name in names if ".partial" not in name}
        except OSError as error:
            raise OutputError(f"run {self}: cannot be created ({error.strerror}): choose another run") from error
        if foreign and not self.is_begun:
            raise OutputError(f"run {self}: is not a run and not empty ({min(foreign)}): choose another run")

    def _names(self) -> set[str]:
        if self.remote is None:
            return {file.name for file in self.path.iterdir()}
        with reaching(self.remote):
            self.remote.mkdir(exist_ok=True)  # there are no folders, but this tells whether there is the bucket
            return {file.name for file in self.remote.iterdir()} if self.remote.exists() else set()

    def check_config(self, config: TrainConfig) -> None:
        """Refuse to go on with another configuration.

        Raises:
            UsageError: names each key that differs, with both values.
        """
        if what := difference(self.read_config(), config, MAY_CHANGE):
            raise UsageError(f"run {self}: was started otherwise: {what}: change it back, or use another run")

    def check_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse to go on with another model or other data, though they go by the same names. All facts of the run.

        Raises:
            UsageError: names what has changed.
        """
        earlier = read_json(self.path / "run.json")
        for key in ("model", "data"):
            if key in facts and earlier[key] != facts[key]:
                raise UsageError(
                    f"run {self}: the {key} is not what the run was started with (digest {earlier[key][:12]},"
                    f" now {facts[key][:12]}): bring it back, or use another run"
                )
        return earlier

    def begin(self, config: TrainConfig, model: Checkpoint, facts: Mapping[str, Any]) -> None:
        """Write down what the run is started with; the configuration last, with which it has begun."""
        shutil.rmtree(self.model, ignore_errors=True)  # what is there is of a start that came to nothing
        (self.path / "growth.json").unlink(missing_ok=True)
        if self.remote is not None:
            with reaching(self.remote):
                (self.remote / "model").rmtree(missing_ok=True)
                (self.remote / "growth.json").unlink(missing_ok=True)
        self.model.mkdir()
        sidecar.copy_allowed(model.folder, self.model)
        sidecar.write_json(self.model / "config.json", model.raw)
        if model.growth is not None:
            sidecar.write_json(self.path / "growth.json", model.growth)
        sidecar.write_json(self.path / "run.json", facts)
        files = [file for file in self.model.rglob("*") if file.is_file()]
        self.mirror(*(file.relative_to(self.path).as_posix() for file in files), "run.json")
        self.mirror(*(["growth.json"] if model.growth is not None else []))
        self.write_config(config)

    def read_config(self) -> TrainConfig:
        """What the run was last started with."""
        return from_yaml(TrainConfig, self.config)

    def write_config(self, config: TrainConfig) -> None:
        """As resolved: it may have changed in what may change."""
        with replacing(self.config) as temporary:
            # Which process of several this one is says nothing of the next time.
            temporary.write_text(to_yaml(dataclasses.replace(config, process=None)), encoding="utf-8")
        self.mirror("config.yaml")

    @property
    def growth(self) -> dict[str, Any] | None:
        file = self.path / "growth.json"
        return read_json(file) if file.is_file() else None


def _open_remote(path: Path | str) -> "epath.Path":
    if not str(path).startswith("gs://"):
        raise UsageError(f"run {path}: of object storage only Google's is supported, gs://BUCKET/PATH")
    from etils import epath

    for name in ("gcsfs", "google.auth"):  # tracebacks and warnings; what matters in them is raised too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return epath.Path(path)


@contextlib.contextmanager
def reaching(remote: "epath.Path") -> Iterator[None]:
    """Whatever fails within is object storage's doing, and is said in one line."""
    try:
        yield
    except ImportError:
        raise UsageError(f"run {remote}: object storage needs pip install 'tli_jax[gcs]'") from None
    except Exception as error:  # gcsfs, aiohttp and google.auth each have their own
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UnavailableError(
            f"run {remote}: object storage refuses or does not answer ({why}): see to the bucket, the credentials"
            " (gcloud auth application-default login) and the network"
        ) from error


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``file``, complete and synced, when the block ends well."""
    temporary = file.with_name(f".{file.name}.partial")
    yield temporary
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(file)


def model_digest(checkpoint: Checkpoint) -> str:
    """Tells models apart: configuration, plan, and every tensor by name, dtype, shape and its first bytes."""
    digest = hashlib.sha256(json.dumps([checkpoint.raw, checkpoint.growth], sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(next(read_chunks(tensor, _SAMPLE)))
    return digest.hexdigest()
