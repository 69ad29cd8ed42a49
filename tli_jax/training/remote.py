"""Run directories in Google Cloud Storage. A run works on a local copy, except for its checkpoints."""

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from tli_jax.errors import MissingInputError, UnavailableError, UsageError
from tli_jax.hf.files import cache_folder, lock, replace_file, storage_errors
from tli_jax.training.run_identity import parse_facts


class RemoteDirectory:
    """A run directory in object storage, and its copy on this machine.

    Methods raise ``UsageError`` if gcsfs is not installed, and ``UnavailableError`` if object storage does not answer.

    Attributes:
        url: an ``epath.Path``, ``gs://…``.
        copy: the local directory.
    """

    def __init__(self, url: Path | str):
        """Raises UsageError: a URL that is not ``gs://…``."""
        if not str(url).startswith("gs://"):
            raise UsageError(f"run {url}: only Google Cloud Storage is supported: use gs://BUCKET/PATH")
        from etils import epath

        for name in ("gcsfs", "google.auth"):  # they log tracebacks and warnings about errors that they also raise
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.url = epath.Path(url)
        self.copy = cache_folder() / hashlib.sha256(str(self.url).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return str(self.url)

    @contextlib.contextmanager
    def _storage(self) -> Iterator[None]:
        try:
            yield
        except ImportError:
            raise UsageError(f"run {self}: object storage needs gcsfs: pip install gcsfs") from None
        except Exception as error:  # gcsfs, aiohttp and google.auth have exceptions of their own
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UnavailableError(
                f"run {self}: object storage refuses access or does not answer ({reason}): check the bucket, the"
                " credentials (gcloud auth application-default login) and the network"
            ) from error

    def read(self, name: str) -> bytes | None:
        """Return the content of an object, or None if it does not exist."""
        with self._storage():
            file = self.url / name
            return file.read_bytes() if file.is_file() else None

    def names(self) -> set[str]:
        """Return the names in the directory."""
        with self._storage():
            self.url.mkdir(exist_ok=True)  # object storage has no directories, but this fails if there is no bucket
            return {file.name for file in self.url.iterdir()} if self.url.exists() else set()

    def upload(self, *names: str) -> None:
        """Copy local files to object storage. Each object appears complete or not at all."""
        for name in names:
            content = (self.copy / name).read_bytes()
            with self._storage():
                (self.url / name).parent.mkdir(parents=True, exist_ok=True)
                (self.url / name).write_bytes(content)

    def delete_model(self) -> None:
        """Delete what an interrupted start has uploaded."""
        with self._storage():
            (self.url / "model").rmtree(missing_ok=True)
            (self.url / "growth.json").unlink(missing_ok=True)

    def fetch(self) -> bool:
        """Update the local copy, except for the metrics. Return whether the run has started.

        Raises:
            DataError, MissingInputError: ``run.json`` is damaged or missing.
        """
        self.copy.mkdir(parents=True, exist_ok=True)
        with lock(self.copy / ".fetching"):
            if self.read("config.yaml") is None:
                return False
            if (facts := self.read("run.json")) is None:
                raise MissingInputError(f"{self}/run.json: is missing: restore it, or use another run directory")
            names = parse_facts(facts, f"{self}/run.json")["files"]
            ours = self.copy / "run.json"
            if not ours.is_file() or ours.read_bytes() != facts:  # incomplete, or of another run with the same URL
                for file in [file for file in self.copy.iterdir() if file.name not in ("data", "lock", ".fetching")]:
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
            for name in (*names, "config.yaml", "run.json"):
                file = self.copy / name
                # Only the configuration ever changes.
                if (name == "config.yaml" or not file.is_file()) and (content := self.read(name)) is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with storage_errors(file), replace_file(file) as temporary:
                        temporary.write_bytes(content)
        return True
