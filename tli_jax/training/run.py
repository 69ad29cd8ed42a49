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
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tli_jax.checkpoint import sidecar
from tli_jax.checkpoint.headers import read_json
from tli_jax.checkpoint.hf import Checkpoint, read_chunks
from tli_jax.config import TrainConfig, from_yaml, to_yaml
from tli_jax.errors import OutputError, UsageError

# What may be another when a run is gone on with: how long, how it is saved and shown, and on what it runs.
MAY_CHANGE = (
    *("steps", "save_every", "keep", "validate_every", "validation_batches", "tensorboard", "wandb", "debug"),
    *("run", "mesh", "distributed", "process", "export", "export_only", "max_shard_size", "overwrite"),
)
# What may be there of a start that came to nothing.
_BEFORE = {"lock", "model", "data", "start", "checkpoints", "run.json", "growth.json"}
_SAMPLE = 4096  # bytes of each tensor that tell one model from another


class RunFolder:
    """One run's folder. Only the first process writes to it, but for the checkpoints."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config, self.model = self.path / "config.yaml", self.path / "model"
        self.checkpoints, self.data = self.path / "checkpoints", self.path / "data"

    @property
    def is_begun(self) -> bool:
        return self.config.is_file()

    def create(self) -> None:
        """Make the folder.

        Raises:
            OutputError: it cannot be made, or something else is in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A lock and half a start are no reason to refuse.
            names = {file.name for file in self.path.iterdir()} - _BEFORE
            foreign = {name for name in names if ".partial" not in name}
        except OSError as error:
            raise OutputError(f"run {self.path}: cannot be created ({error.strerror}): choose another run") from error
        if foreign and not self.is_begun:
            raise OutputError(f"run {self.path}: is not a run and not empty ({min(foreign)}): choose another run")

    def check_config(self, config: TrainConfig) -> None:
        """Refuse to go on with another configuration.

        Raises:
            UsageError: names each key that differs, with both values.
        """
        earlier, now = dataclasses.asdict(self.read_config()), dataclasses.asdict(config)
        differing = [key for key in now if key not in MAY_CHANGE and earlier[key] != now[key]]
        if differing:
            what = "; ".join(f"{key} was {earlier[key]!r}, is {now[key]!r}" for key in differing)
            raise UsageError(f"run {self.path}: was started otherwise: {what}: change it back, or use another run")

    def check_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse to go on with another model or other data, though they go by the same names. All facts of the run.

        Raises:
            UsageError: names what has changed.
        """
        earlier = read_json(self.path / "run.json")
        for key in ("model", "data"):
            if key in facts and earlier[key] != facts[key]:
                raise UsageError(
                    f"run {self.path}: the {key} is not what the run was started with (digest {earlier[key][:12]},"
                    f" now {facts[key][:12]}): bring it back, or use another run"
                )
        return earlier

    def begin(self, config: TrainConfig, model: Checkpoint, facts: Mapping[str, Any]) -> None:
        """Write down what the run is started with; the configuration last, with which it has begun."""
        shutil.rmtree(self.model, ignore_errors=True)  # what is there is of a start that came to nothing
        (self.path / "growth.json").unlink(missing_ok=True)
        self.model.mkdir()
        sidecar.copy_allowed(model.folder, self.model)
        sidecar.write_json(self.model / "config.json", model.raw)
        if model.growth is not None:
            sidecar.write_json(self.path / "growth.json", model.growth)
        sidecar.write_json(self.path / "run.json", facts)
        self.write_config(config)

    def read_config(self) -> TrainConfig:
        """What the run was last started with."""
        return from_yaml(TrainConfig, self.config)

    def write_config(self, config: TrainConfig) -> None:
        """As resolved: it may have changed in what may change."""
        with replacing(self.config) as temporary:
            # Which process of several this one is says nothing of the next time.
            temporary.write_text(to_yaml(dataclasses.replace(config, process=None)), encoding="utf-8")

    @property
    def growth(self) -> dict[str, Any] | None:
        file = self.path / "growth.json"
        return read_json(file) if file.is_file() else None


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


def tokenizer_digest(folder: Path) -> str:
    """Of the files that say how text becomes tokens."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()


class Metrics:
    """``metrics.jsonl``, and what else was asked for: TensorBoard, Weights & Biases."""

    def __init__(self, run: RunFolder, config: TrainConfig, step: int, run_id: str):
        """Open, cut back to ``step``: what came after is going to be done again.

        Raises:
            UsageError: a library that was asked for is not installed.
        """
        file = run.path / "metrics.jsonl"
        kept = [line for line in _whole_lines(file) if line["step"] <= step]
        with replacing(file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = file.open("a", encoding="utf-8")
        self._tensorboard = self._wandb = None
        if config.tensorboard:
            writer = _need("tensorboardX", "tensorboard").SummaryWriter
            self._tensorboard = writer(str(run.path / "tensorboard"), purge_step=step + 1)
        if config.wandb:
            self._wandb = _need("wandb", "wandb").init(
                project=config.wandb, id=run_id, resume="allow", dir=str(run.path), config=dataclasses.asdict(config)
            )

    def write(self, values: Mapping[str, Any]) -> None:
        """One step's."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        numbers = {key: value for key, value in values.items() if key != "step" and isinstance(value, int | float)}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, values["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=values["step"])

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """All steps, in order."""
    return _whole_lines(run.path / "metrics.jsonl")


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """The last line may be half of one, where a process was killed."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _need(module: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"{extra} needs pip install 'tli_jax[{extra}]'") from None
