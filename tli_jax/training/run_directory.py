"""The folder of a run: what it was started with, so that it resumes with the same, and its metrics.

::

    RUN/config.yaml      the configuration as resolved; rewritten when what may change does
    RUN/run.json         id, the rest of the configuration, digests of model, data and the files below, versions
    RUN/growth.json      the plan, where the model was grown
    RUN/model/           configuration, tokenizer and notices of the model; its weights are in the checkpoints
    RUN/start/           the model, where it came from another run
    RUN/data/            the text as token ids
    RUN/metrics.jsonl    one object a step
    RUN/checkpoints/

``run.json`` never changes: every checkpoint carries its digest, and it holds those of ``growth.json`` and ``model/``.

A run in object storage has its checkpoints there alone. Its other files are worked on in a copy on this machine; what
another machine needs to resume (all but ``start`` and ``data``) is written there too.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.cli.config import TrainConfig
from tli_jax.cli.parse import difference, from_yaml
from tli_jax.cli.yaml_file import plain, to_yaml
from tli_jax.errors import DataError, MissingInputError, OutputError, StorageError, UnavailableError, UsageError
from tli_jax.hf import sidecar
from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.hf.inputs import parse_json
from tli_jax.hf.records import read_growth
from tli_jax.hf.tensors import read_chunks

if TYPE_CHECKING:
    from etils import epath

# What may be another when a run is gone on with: how long, how it is saved and shown, and on what it runs.
MAY_CHANGE = (
    *("steps", "save_every", "keep", "validate_every", "validation_batches", "track"),
    # Where the text is. Whether it is the same is told by its digest.
    *("text", "validation_text"),
    *("run", "mesh", "distributed", "process", "export", "export_only", "max_shard_size", "overwrite"),
)
# Left by a start that was interrupted before the run had begun.
_BEFORE = {"lock", "model", "data", "start", "run.json", "growth.json"}
# What run.json must hold; of the mappings marked so, every value must be text.
_TEXTS = {"files", "dtypes", "versions"}
_FACTS = {"id": str, "model": str, "data": str, "sources": list, "base": dict, "earlier": list, "config": dict}
_FACTS |= dict.fromkeys(_TEXTS, dict)
_COVERED = re.compile(r"growth\.json|model(/(?!\.\.?(/|$))[^/\\\0]+)+")
_SAMPLE = 4096  # bytes of each tensor that tell one model from another


class RunDirectory:
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
        """Bring this machine's copy of a remote run up to date, except for the metrics; whether the run has begun.

        Raises:
            UsageError, UnavailableError: what reaches object storage is not installed, or does not reach it.
            DataError: ``run.json`` is damaged.
            StorageError: the copy cannot be written.
        """
        if (remote := self.remote) is None:
            return self.config.is_file()
        self.path.mkdir(parents=True, exist_ok=True)
        # One process of this machine at a time.
        with (self.path / ".fetching").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if _fetch(remote / "config.yaml") is None:
                return False
            facts, here = _fetch(remote / "run.json"), self.path / "run.json"
            if facts is None:
                raise MissingInputError(f"{remote / 'run.json'}: is missing: restore it, or use another run folder")
            names = _parse_facts(facts, str(remote / "run.json"))["files"]
            if not here.is_file() or here.read_bytes() != facts:  # the copy is of another run of this name, or half
                for old in [old for old in self.path.iterdir() if old.name not in ("data", "lock", ".fetching")]:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            for name in (*names, "config.yaml", "run.json"):
                # Only the configuration ever changes.
                is_wanted = name == "config.yaml" or not (self.path / name).is_file()
                if is_wanted and (content := _fetch(remote / name)) is not None:
                    (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                    with replacing(self.path / name) as temporary:
                        temporary.write_bytes(content)
        return True

    def mirror(self, *names: str) -> None:
        """Write files of this machine's copy to object storage; each appears there whole or not at all.

        Raises:
            UnavailableError: object storage does not take them.
        """
        if self.remote is not None:
            for name in names:
                content = (self.path / name).read_bytes()
                with reaching(self.remote):
                    (self.remote / name).parent.mkdir(parents=True, exist_ok=True)
                    (self.remote / name).write_bytes(content)

    def create(self) -> None:
        """Make the folder.

        Raises:
            OutputError: it cannot be made, or something else is in it.
            UsageError: it holds checkpoints of an earlier run, or what reaches object storage is not installed.
            UnavailableError: object storage does not answer.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A lock and half a start are no reason to refuse.
            names = self._names() - _BEFORE
            foreign = {name for name in names if ".partial" not in name}
        except OSError as error:
            raise OutputError(f"run {self}: cannot be created ({error.strerror}): choose another run") from error
        if "checkpoints" in foreign and not self.is_begun:
            raise UsageError(
                f"run {self}: holds checkpoints of an earlier run, whose config.yaml is missing: restore that, delete"
                " checkpoints, or use another run folder"
            )
        if foreign and not self.is_begun:
            raise OutputError(f"run {self}: is not a run and not empty ({min(foreign)}): choose another run")

    def _names(self) -> set[str]:
        if self.remote is None:
            return {file.name for file in self.path.iterdir()}
        with reaching(self.remote):
            self.remote.mkdir(exist_ok=True)  # there are no folders, but this tells whether there is the bucket
            return {file.name for file in self.remote.iterdir()} if self.remote.exists() else set()

    def check_config(self, config: TrainConfig) -> None:
        """Refuse to resume with another configuration, or if the run's own files were changed behind its back.

        Raises:
            UsageError: names each key that differs, with both values; or the file that was changed.
            DataError, MissingInputError: see ``read_facts``.
        """
        facts = self.read_facts()
        _check_files(self.path, facts["files"])
        stored = self.read_config()
        recorded, now = facts["config"], _fixed(stored)
        # A key that a later version added is not in the record.
        changed = [key for key in recorded if key not in MAY_CHANGE and recorded[key] != now.get(key)]
        if changed:
            what = "; ".join(f"{key} was {recorded[key]!r}, is {now.get(key)!r}" for key in changed)
            raise UsageError(
                f"{self.config}: does not match run.json: {what}: one of them was changed after the run had begun,"
                " restore it"
            )
        if what := difference(stored, config, MAY_CHANGE):
            raise UsageError(f"run {self}: was started with other options: {what}: change them, or use another run")

    def check_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse to resume with another model or other data of the same name. Returns all facts of the run.

        Raises:
            UsageError: names what has changed.
            DataError, MissingInputError: see ``read_facts``.
        """
        earlier = self.read_facts()
        for key in ("model", "data"):
            if key in facts and earlier[key] != facts[key]:
                raise UsageError(
                    f"run {self}: the {key} is not what the run was started with (digest {earlier[key][:12]},"
                    f" now {facts[key][:12]}): bring it back, or use another run"
                )
        return earlier

    def read_facts(self) -> dict[str, Any]:
        """The content of ``run.json``.

        Raises:
            MissingInputError: there is none.
            DataError: it is damaged, or a key is missing or of the wrong type.
        """
        file = self.path / "run.json"
        if not file.is_file():
            raise MissingInputError(f"{file}: is missing: restore it from a copy, or use another run folder")
        return _parse_facts(file.read_bytes(), str(file))

    @property
    def identity(self) -> dict[str, str]:
        """What tells this run from every other: its id, and digests of all that it was started with."""
        facts = self.read_facts()
        config = json.dumps(facts["config"], sort_keys=True).encode()
        return {
            "id": facts["id"],
            "model": facts["model"],
            "data": facts["data"],
            "plan": facts["files"].get("growth.json", "none"),
            "configuration": hashlib.sha256(config).hexdigest(),
            "run.json": _sha256(self.path / "run.json"),
        }

    def begin(self, config: TrainConfig, model: Checkpoint, facts: Mapping[str, Any]) -> None:
        """Write down what the run is started with; last the configuration, whose presence means that it has begun.

        Raises:
            StorageError: the system refused to write.
            UnavailableError: object storage does not take it.
        """
        if self.remote is not None:
            with reaching(self.remote):
                (self.remote / "model").rmtree(missing_ok=True)
                (self.remote / "growth.json").unlink(missing_ok=True)
        with writing(self.path):
            shutil.rmtree(self.model, ignore_errors=True)  # left by a start that was interrupted
            (self.path / "growth.json").unlink(missing_ok=True)
            self.model.mkdir()
            sidecar.copy_allowed(model.folder, self.model)
            sidecar.write_json(self.model / "config.json", model.raw)
            if model.growth is not None:
                sidecar.write_json(self.path / "growth.json", model.growth)
            files = {name: _sha256(self.path / name) for name in _covered(self.path)}
            with replacing(self.path / "run.json") as temporary:
                sidecar.write_json(temporary, {**facts, "config": _fixed(config), "files": files})
        self.mirror(*files, "run.json")
        self.write_config(config)

    def read_config(self) -> TrainConfig:
        """What the run was last started with. Only ``check_config`` tells whether it was changed since."""
        return from_yaml(TrainConfig, self.config)

    def write_config(self, config: TrainConfig) -> None:
        """As resolved: it may have changed in what may change.

        Raises:
            StorageError: the system refused to write.
        """
        with replacing(self.config) as temporary:
            # Which of several processes this one is means nothing the next time.
            temporary.write_text(to_yaml(dataclasses.replace(config, process=None)), encoding="utf-8")
        self.mirror("config.yaml")

    @property
    def growth(self) -> dict[str, Any] | None:
        file = self.path / "growth.json"
        return read_growth(file) if file.is_file() else None


def _open_remote(path: Path | str) -> "epath.Path":
    if not str(path).startswith("gs://"):
        raise UsageError(f"run {path}: of object storage only Google's is supported, gs://BUCKET/PATH")
    from etils import epath

    for name in ("gcsfs", "google.auth"):  # tracebacks and warnings; what matters in them is raised too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return epath.Path(path)


def _fetch(file: "epath.Path") -> bytes | None:
    """The content of an object, None if there is none."""
    with reaching(file.parent):
        return file.read_bytes() if file.is_file() else None


def _parse_facts(content: bytes, where: str) -> dict[str, Any]:
    facts = parse_json(content, where)
    bad = [key for key, kind in _FACTS.items() if not isinstance(facts.get(key), kind)]
    bad += [key for key in sorted(_TEXTS - set(bad)) if not all(isinstance(text, str) for text in facts[key].values())]
    if not bad and not all(map(_COVERED.fullmatch, facts["files"])):
        bad = ["files"]
    if not bad and not all(isinstance(digest, str) for digest in facts["sources"]):
        bad = ["sources"]
    if bad:
        raise DataError(
            f"{where}: {', '.join(bad)} is missing or damaged: restore the file from a copy, or use another run folder"
        )
    return facts


def _fixed(config: TrainConfig) -> dict[str, Any]:
    """What may not change, as JSON gives it back."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in MAY_CHANGE}
    return json.loads(json.dumps(plain(values)))


def _covered(folder: Path) -> list[str]:
    """The files that ``run.json`` holds digests of. Hidden ones are a file system's or an editor's."""
    model = [file for file in (folder / "model").rglob("*") if not file.is_dir() and not file.name.startswith(".")]
    return sorted(str(file.relative_to(folder)) for file in [*model, *folder.glob("growth.json")])


def _check_files(folder: Path, recorded: Mapping[str, str]) -> None:
    for name in sorted({*recorded, *_covered(folder)}):
        file = folder / name
        if name not in recorded:
            raise UsageError(f"{file}: was added after the run had begun: remove it")
        # What is far too large is not what was there: it is not read to the end to find out.
        if not file.is_file() or file.stat().st_size > sidecar.LARGEST or _sha256(file) != recorded[name]:
            what = "changed" if file.exists() else "removed"
            raise UsageError(
                f"{file}: was {what} after the run had begun: restore it from a copy, or use another run folder"
            )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
def writing(path: Path) -> Iterator[None]:
    """A refusal of the system inside becomes one line that names the path, which the system often does not.

    Raises:
        StorageError: see above.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: cannot be written ({error.strerror or error}): free space or fix permissions,"
            " then run the same command again"
        ) from error


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``file``, complete and synced, when the block ends well.

    Raises:
        StorageError: the system refused to write. ``file`` is untouched.
    """
    temporary = file.with_name(f".{file.name}.partial")
    with writing(file):
        try:
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def model_digest(checkpoint: Checkpoint) -> str:
    """Tells models apart: configuration, plan, and every tensor by name, dtype, shape and its first bytes."""
    digest = hashlib.sha256(json.dumps([checkpoint.raw, checkpoint.growth], sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(next(read_chunks(tensor, _SAMPLE)))
    return digest.hexdigest()
