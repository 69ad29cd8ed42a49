"""The directory of a run: what it was started with, so that it resumes with the same, and what it wrote.

::

    RUN/config.yaml      the resolved configuration; rewritten when a key that may change has changed
    RUN/run.json         the run's id, the fixed part of the configuration, digests, versions
    RUN/growth.json      the plan, if the model is grown
    RUN/model/           the model's configuration, tokenizer and licence; its weights are in the checkpoints
    RUN/start/           the model, if it comes from another run
    RUN/data/            the text as token ids, unless it is prepared data
    RUN/metrics.jsonl    one line per step
    RUN/profile/         traces of --profile
    RUN/checkpoints/

``run.json`` never changes. It holds digests of the model, the data, ``growth.json`` and ``model/``. Every checkpoint
holds the digest of ``run.json``.

The checkpoints of a run in object storage are only there. Its other files are written to a local copy, and all that
another machine needs to resume is uploaded (everything except ``start`` and ``data``).
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tli_jax.cli.fields import difference
from tli_jax.cli.parse import from_yaml
from tli_jax.cli.train_config import TrainConfig
from tli_jax.cli.yaml_file import plain, to_yaml
from tli_jax.distributed.processes import is_first
from tli_jax.errors import MissingInputError, OutputError, StorageError, UsageError
from tli_jax.hf import sidecar
from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.hf.files import lock, replace_file, sha256_file, storage_errors
from tli_jax.hf.records import read_growth
from tli_jax.training.remote import RemoteDirectory
from tli_jax.training.run_identity import check_files, file_digests, parse_facts

# Keys that may change when a run resumes: its length, how it is saved and shown, and where it runs.
MAY_CHANGE = (
    *("steps", "save_every", "keep", "validate_every", "validation_batches", "track", "profile"),
    *("text", "validation_text", "verify"),  # paths; the text itself is compared by digest
    *("run", "mesh", "distributed", "process", "timeouts", "export", "export_only", "max_shard_size", "overwrite"),
)
# Left behind by a start that was interrupted.
_UNFINISHED_START = {"lock", "model", "data", "start", "run.json", "growth.json"}


class RunDirectory:
    """The directory of one run. Only process 0 writes to it, except for the checkpoints.

    Methods that write raise ``StorageError``. Those of a remote run raise ``UnavailableError`` if object storage does
    not answer.

    Attributes:
        path: the directory, or its local copy if the run is in object storage.
        remote: set if the run is in object storage.
    """

    def __init__(self, path: Path | str):
        """Raises UsageError: a URL that is not ``gs://…``."""
        self.remote = RemoteDirectory(path) if "://" in str(path) else None
        self.path = self.remote.copy if self.remote else Path(path)
        self.config, self.model, self.data = self.path / "config.yaml", self.path / "model", self.path / "data"
        self.checkpoints = (self.remote.url if self.remote else self.path) / "checkpoints"

    def __str__(self) -> str:
        return str(self.remote or self.path)

    @property
    def is_begun(self) -> bool:
        """Whether the run has started. Updates the local copy of a remote run."""
        return self.remote.fetch() if self.remote else self.config.is_file()

    def create(self) -> None:
        """Create the directory.

        Raises:
            OutputError: it cannot be created, or contains something else.
            UsageError: it contains checkpoints of an earlier run.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = self.remote.names() if self.remote else {file.name for file in self.path.iterdir()}
        except OSError as error:
            raise OutputError(f"run {self}: cannot be created ({error.strerror}): choose another directory") from error
        foreign = {name for name in names - _UNFINISHED_START if ".partial" not in name}
        if not foreign or self.is_begun:
            return
        if "checkpoints" in foreign:
            raise UsageError(
                f"run {self}: contains checkpoints of an earlier run, but no config.yaml: restore it, delete"
                " checkpoints, or use another run directory"
            )
        raise OutputError(f"run {self}: is not a run and not empty ({min(foreign)}): choose another directory")

    def begin(self, config: TrainConfig, model: Checkpoint, facts: Mapping[str, Any]) -> None:
        """Record what the run starts with. The configuration is written last: it marks the run as started.

        Args:
            facts: the keys of ``run.json``, except for ``config`` and ``files``.
        """
        if self.remote:
            self.remote.delete_model()
        with storage_errors(self.path):
            shutil.rmtree(self.model, ignore_errors=True)  # left behind by an interrupted start
            (self.path / "growth.json").unlink(missing_ok=True)
            self.model.mkdir()
            sidecar.copy_allowed(model.folder, self.model)
            sidecar.write_json(self.model / "config.json", model.raw)
            if model.growth is not None:
                sidecar.write_json(self.path / "growth.json", model.growth)
            files = file_digests(self.path)
            with replace_file(self.path / "run.json") as temporary:
                sidecar.write_json(temporary, {**facts, "config": _fixed(config), "files": files})
        self.upload(*files, "run.json")
        self.write_config(config)

    def fetch(self) -> None:
        """Update the local copy of a remote run, see ``RemoteDirectory.fetch``."""
        if self.remote:
            self.remote.fetch()

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist; of a remote run, see ``RemoteDirectory.read``."""
        if self.remote:
            return self.remote.read(name)
        file = self.path / name
        return file.read_bytes() if file.is_file() else None

    def upload(self, *names: str) -> None:
        """Upload files of a remote run, see ``RemoteDirectory.upload``."""
        if self.remote:
            self.remote.upload(*names)

    def check_config(self, config: TrainConfig) -> None:
        """Check that a run can resume with a configuration, and that its files have not been changed.

        Raises:
            UsageError: a key differs, with both values; or a file was changed.
        """
        facts = self.read_facts()
        check_files(self.path, facts["files"])
        stored = self.read_config()
        recorded, current = facts["config"], _fixed(stored)
        # A run of an earlier version has no record of a newer key.
        changed = [key for key in recorded if key not in MAY_CHANGE and recorded[key] != current.get(key)]
        if changed:
            values = "; ".join(f"{key} was {recorded[key]!r}, is {current.get(key)!r}" for key in changed)
            raise UsageError(
                f"{self.config}: does not match run.json: {values}: one of them was changed after the run started,"
                " restore it"
            )
        if values := difference(stored, config, MAY_CHANGE):
            raise UsageError(
                f"run {self}: was started with other options: {values}: change them back, or use another run"
            )

    def check_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Check that the digests of model and data in ``facts``, if any, are those of the run. Return ``run.json``.

        Raises:
            UsageError: the model or the data have changed.
        """
        recorded = self.read_facts()
        for key in ("model", "data"):
            if key in facts and recorded[key] != facts[key]:
                raise UsageError(
                    f"run {self}: the {key} has changed since the run started (digest {recorded[key][:12]},"
                    f" now {facts[key][:12]}): restore it, or use another run directory"
                )
        return recorded

    def read_facts(self) -> dict[str, Any]:
        """Read ``run.json``.

        Raises:
            MissingInputError: it does not exist.
            DataError: it is damaged, or a key is missing or has the wrong type.
        """
        file = self.path / "run.json"
        if not file.is_file():
            raise MissingInputError(f"{file}: is missing: restore it from a copy, or use another run directory")
        return parse_facts(file.read_bytes(), str(file))

    @property
    def identity(self) -> dict[str, str]:
        """The run's id, and digests of everything it was started with. Every checkpoint carries them."""
        facts = self.read_facts()
        config = json.dumps(facts["config"], sort_keys=True).encode()
        return {
            "id": facts["id"],
            "model": facts["model"],
            "data": facts["data"],
            "plan": facts["files"].get("growth.json", "none"),
            "configuration": hashlib.sha256(config).hexdigest(),
            "run.json": sha256_file(self.path / "run.json"),
        }

    def read_config(self) -> TrainConfig:
        """Read ``config.yaml``. ``check_config`` checks that nobody has edited it."""
        return from_yaml(TrainConfig, self.config)

    def write_config(self, config: TrainConfig) -> None:
        """Write ``config.yaml``, and upload it."""
        with storage_errors(self.config), replace_file(self.config) as temporary:
            # Not stored: the processes of this start, and what was asked for once.
            stored = dataclasses.replace(config, distributed=False, process=None, timeouts={}, profile=0, verify=False)
            temporary.write_text(to_yaml(stored), encoding="utf-8")
        self.upload("config.yaml")

    @property
    def growth(self) -> dict[str, Any] | None:
        """The content of ``growth.json``, or None if the model is not grown."""
        file = self.path / "growth.json"
        return read_growth(file) if file.is_file() else None


@contextlib.contextmanager
def lock_directory(path: Path) -> Iterator[None]:
    """Hold ``path/lock`` in process 0. The system releases it when the process ends, however it ends.

    Raises:
        OutputError: another process holds it.
        StorageError: it cannot be opened.
    """
    with contextlib.ExitStack() as held:
        if is_first():
            try:
                held.enter_context(lock(path / "lock", blocking=False))
            except BlockingIOError:
                raise OutputError(
                    f"run {path} is in use by another process: wait for it, or use another directory"
                ) from None
            except OSError as error:
                raise StorageError(
                    f"{path / 'lock'}: cannot be opened ({error.strerror}): fix its permissions"
                ) from error
        yield


def _fixed(config: TrainConfig) -> dict[str, Any]:
    """Return the keys that may not change, with values as JSON restores them."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in MAY_CHANGE}
    return json.loads(json.dumps(plain(values)))
