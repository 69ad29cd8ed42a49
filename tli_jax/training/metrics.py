"""What a run measures, one object a step: in ``metrics.jsonl``, and where else it was asked for."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.config import TrainConfig
from tli_jax.errors import UsageError
from tli_jax.training.run import RunFolder, reaching, replacing

if TYPE_CHECKING:
    from etils import epath


class Metrics:
    """``metrics.jsonl``, and what else was asked for: TensorBoard, Weights & Biases."""

    def __init__(self, run: RunFolder, config: TrainConfig, step: int, run_id: str):
        """Open, cut back to ``step``: what came after is going to be done again.

        Raises:
            UsageError: a library that was asked for is not installed.
        """
        file = run.path / "metrics.jsonl"
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        with replacing(file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._run, self._file = run, file.open("a", encoding="utf-8")
        self._tensorboard = self._wandb = None
        if "tensorboard" in config.track:
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

    def mirror(self) -> None:
        """To object storage, where nothing can be appended to: all lines so far, as one object."""
        self._run.mirror("metrics.jsonl")

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self.mirror()


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """All steps, in order."""
    if run.remote is None:
        return _whole_lines(run.path / "metrics.jsonl")
    with reaching(run.remote):
        return _whole_lines(run.remote / "metrics.jsonl")


def _whole_lines(file: "Path | epath.Path") -> list[dict[str, Any]]:
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
