"""What a run measures, one object per step: in ``metrics.jsonl``, and where else it was asked for."""

import bisect
import dataclasses
import json
import math
import os
import statistics
from collections.abc import Mapping
from typing import Any

from tli_jax.cli.config import TrainConfig
from tli_jax.cli.console import warn
from tli_jax.errors import UsageError
from tli_jax.training.run_directory import RunDirectory, reaching, replacing, writing

# What every line holds. A loss or a rate that is not finite is null.
_COUNTS, _RATE = {"step", "tokens", "skipped"}, "tokens_per_second"
_KEYS = {*_COUNTS, _RATE, "loss", "mfu"}


class Metrics:
    """``metrics.jsonl``, and what else was asked for: TensorBoard, Weights & Biases."""

    def __init__(self, run: RunDirectory, config: TrainConfig, step: int, run_id: str):
        """Open the file and drop the lines after ``step``, whose steps are repeated.

        Raises:
            UsageError: a library that was asked for is not installed.
            StorageError: the system refused to write.
        """
        file = run.path / "metrics.jsonl"
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        with replacing(file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._run, self._path, self._file = run, file, file.open("ab", buffering=0)
        self._tensorboard = self._wandb = None
        if "tensorboard" in config.track:
            writer = _need("tensorboardX", "tensorboard").SummaryWriter
            self._tensorboard = writer(str(run.path / "tensorboard"), purge_step=step + 1)
        if config.wandb:
            self._wandb = _need("wandb", "wandb").init(
                project=config.wandb, id=run_id, resume="allow", dir=str(run.path), config=dataclasses.asdict(config)
            )

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one step's line.

        Raises:
            StorageError: the system refused to write.
        """
        data = (json.dumps(values) + "\n").encode()
        with writing(self._path):
            while data:  # a full disk first takes a part
                data = data[self._file.write(data) :]
        numbers = {key: value for key, value in values.items() if key != "step" and isinstance(value, int | float)}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, values["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=values["step"])

    def mirror(self) -> None:
        """Write all lines so far to object storage, as one object: nothing can be appended to there."""
        self._run.mirror("metrics.jsonl")

    def close(self) -> None:
        with writing(self._path), self._file:
            os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self.mirror()


def read_metrics(run: RunDirectory) -> list[dict[str, Any]]:
    """The whole lines, in order of their steps. Damaged lines are dropped, and a warning says how many.

    Each line has the counts ``step``, ``tokens`` and ``skipped``, a positive ``tokens_per_second``, and ``loss``,
    ``mfu`` and whatever else was measured as a finite number or None.
    """
    if run.remote is None:
        file = run.path / "metrics.jsonl"
        content = file.read_bytes() if file.is_file() else b""
    else:
        file = run.remote / "metrics.jsonl"
        with reaching(run.remote):
            content = file.read_bytes() if file.is_file() else b""
    # A kill may leave half of the last line.
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    found = _rising([line for line in map(_parse_line, lines) if line is not None])
    if dropped := len(lines) - len(found):
        warn(f"{file}: {dropped} of {len(lines)} lines are damaged and ignored")
    return found


def _parse_line(text: bytes) -> dict[str, Any] | None:
    """None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or a number that is too long
        return None
    if not isinstance(line, dict) or not line.keys() >= _KEYS:
        return None
    if not all(value is None or (type(value) in (int, float) and _is_finite(value)) for value in line.values()):
        return None
    counts = all(type(line[key]) is int and line[key] >= 0 for key in _COUNTS)
    return line if counts and line["step"] and (line[_RATE] or 0) > 0 else None


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _rising(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many lines as possible whose steps rise: one step that is too high must not cost all after it."""
    ends: list[int] = []  # of the best run of each length, the last step …
    at: list[int] = []  # … and its line
    before: list[int | None] = []
    for i, line in enumerate(lines):
        length = bisect.bisect_left(ends, line["step"])
        before.append(at[length - 1] if length else None)
        ends[length : length + 1], at[length : length + 1] = [line["step"]], [i]
    found, i = [], at[-1] if at else None
    while i is not None:
        found.append(lines[i])
        i = before[i]
    return found[::-1]


def validation(lines: list[dict[str, Any]]) -> list[tuple[int, float | None]]:
    """Validation loss after so many tokens; the first is before training. None where it was not finite."""
    before = [(0, line["validation_loss_before"]) for line in lines if "validation_loss_before" in line]
    return before + [(line["tokens"], line["validation_loss"]) for line in lines if "validation_loss" in line]


def losses(lines: list[dict[str, Any]]) -> dict[str, float | None]:
    """The losses of a run in nats per token: ``validation_before`` and ``validation_after`` training, and ``training``,
    the mean over the last tenth of the steps, as single batches differ. None where there is none, or it is not
    finite."""
    values = [value for _, value in validation(lines)]
    tail = [line["loss"] for line in lines[-max(1, len(lines) // 10) :] if line["loss"] is not None]
    before, after = (values[0], values[-1]) if values else (None, None)
    return {
        "validation_before": before,
        "validation_after": after,
        "training": statistics.fmean(tail) if tail else None,
    }


def _need(module: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"{extra} needs pip install 'tli_jax[{extra}]'") from None
