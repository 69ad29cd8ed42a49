"""The metrics of a run, one line per step, in ``metrics.jsonl`` and optionally TensorBoard or Weights & Biases."""

import bisect
import dataclasses
import importlib
import json
import math
import os
import statistics
from collections.abc import Mapping
from typing import Any

from tli_jax.cli.console import warn
from tli_jax.cli.train_config import TrainConfig
from tli_jax.errors import UsageError
from tli_jax.hf.files import replace_file, storage_errors
from tli_jax.training.run_directory import RunDirectory

_FILE = "metrics.jsonl"
# Keys of every line. A loss or a rate that is not finite is null.
_COUNTS, _RATE = {"step", "tokens", "skipped"}, "tokens_per_second"
_KEYS = {*_COUNTS, _RATE, "loss", "mfu"}


class Metrics:
    """Writes the metrics of a run. Raises ``StorageError`` if the system refuses to write."""

    def __init__(self, run: RunDirectory, config: TrainConfig, step: int, run_id: str):
        """Open the file and drop the lines after ``step``, whose steps will be repeated.

        Raises:
            UsageError: TensorBoard or Weights & Biases is requested but not installed.
        """
        file = run.path / _FILE
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        with storage_errors(file), replace_file(file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._run, self._path, self._file = run, file, file.open("ab", buffering=0)
        self._tensorboard = self._wandb = None
        if "tensorboard" in config.track:
            writer = _import("tensorboardX").SummaryWriter
            self._tensorboard = writer(str(run.path / "tensorboard"), purge_step=step + 1)
        if config.wandb:
            self._wandb = _import("wandb").init(
                project=config.wandb, id=run_id, resume="allow", dir=str(run.path), config=dataclasses.asdict(config)
            )

    def write(self, values: Mapping[str, Any]) -> None:
        """Append the line of one step."""
        data = (json.dumps(values) + "\n").encode()
        with storage_errors(self._path):
            while data:  # a full disk may take only a part
                data = data[self._file.write(data) :]
        numbers = {key: value for key, value in values.items() if key != "step" and isinstance(value, int | float)}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, values["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=values["step"])

    def upload(self) -> None:
        """Upload all lines so far, if the run is in object storage, where objects cannot be appended to."""
        self._run.upload(_FILE)

    def close(self) -> None:
        """Flush everything to disk, and upload it."""
        with storage_errors(self._path), self._file:
            os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self.upload()


def read_metrics(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` in order of their steps. Drop damaged lines, with a warning.

    Every line has the counts ``step``, ``tokens`` and ``skipped``, and a positive ``tokens_per_second``. ``loss``,
    ``mfu`` and all other values are finite numbers or None.
    """
    content = run.read(_FILE) or b""
    # A killed run may have written only a part of its last line.
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    valid = _longest_increasing([line for line in map(_parse_line, lines) if line is not None])
    if damaged := len(lines) - len(valid):
        warn(f"{run}/{_FILE}: {damaged} of {len(lines)} lines are damaged and ignored")
    return valid


def _parse_line(text: bytes) -> dict[str, Any] | None:
    """Return None if the line is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, nested too deeply, or a number with too many digits
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
    except OverflowError:  # an integer beyond the range of floats
        return False


def _longest_increasing(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the longest subsequence with increasing steps: one wrong step must not cost all lines after it."""
    ends: list[int] = []  # the smallest last step of an increasing subsequence of each length,
    at: list[int] = []  # and the index of its line
    previous: list[int | None] = []
    for i, line in enumerate(lines):
        length = bisect.bisect_left(ends, line["step"])
        previous.append(at[length - 1] if length else None)
        ends[length : length + 1], at[length : length + 1] = [line["step"]], [i]
    longest, i = [], at[-1] if at else None
    while i is not None:
        longest.append(lines[i])
        i = previous[i]
    return longest[::-1]


def validation(lines: list[dict[str, Any]]) -> list[tuple[int, float | None]]:
    """Return (tokens, validation loss) pairs, the first before training. A loss is None if it was not finite."""
    before = [(0, line["validation_loss_before"]) for line in lines if "validation_loss_before" in line]
    return before + [(line["tokens"], line["validation_loss"]) for line in lines if "validation_loss" in line]


def losses(lines: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the losses of a run in nats per token.

    ``validation_before`` the first and ``validation_after`` the last of these steps, and ``training``, the mean over
    the last tenth of them. A loss is None if it was not measured there or not finite.
    """
    tail = [line["loss"] for line in lines[-max(1, len(lines) // 10) :] if line["loss"] is not None]
    return {
        "validation_before": next((value for _, value in validation(lines)), None),
        "validation_after": lines[-1].get("validation_loss") if lines else None,
        "training": statistics.fmean(tail) if tail else None,
    }


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"track needs {module}: pip install {module}") from None
