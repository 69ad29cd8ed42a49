"""The training loop: data, metrics, validation, checkpoints and stopping.

The loop does not wait for the step that it has just dispatched: the metrics of step n are read while step n + 1 runs.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from tli_jax.cli.console import console, finite
from tli_jax.cli.progress import Advance
from tli_jax.data.batches import Data
from tli_jax.distributed.processes import StopSignal, flag_array
from tli_jax.errors import DivergedError, StoppedError
from tli_jax.training.checkpoints import Checkpoints
from tli_jax.training.feed import Feed
from tli_jax.training.freezing import Arrays
from tli_jax.training.metrics import Metrics
from tli_jax.training.profile import AFTER, summarise, tables, trace
from tli_jax.training.step import Programs, TrainState

# Dense bf16 FLOP/s per device as published by the manufacturer, by the prefix of ``jax.Device.device_kind``.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: Any) -> float | None:
    """Peak FLOP/s of a device; None if unknown."""
    kinds = [kind for kind in _PEAK_FLOPS if device.device_kind.startswith(kind)]
    return _PEAK_FLOPS[max(kinds, key=len)] if kinds else None


@dataclasses.dataclass
class Loop:
    """The training loop of one run.

    Attributes:
        metrics: None in every process but the first.
        facts: JSON to store with every checkpoint.
        report: called with one line for each validation, checkpoint and profile.
        profile: folder for the profile of some steps; None in every process but the first.
        loss_before: the held-out loss before the first step, if it is known. It is not measured then.
        save_last: whether to save the last step.
    """

    programs: Programs
    data: Data
    checkpoints: Checkpoints
    metrics: Metrics | None
    facts: dict[str, Any]
    report: Callable[[str], None]
    profile: Path | None = None
    loss_before: float | None = None
    save_last: bool = True

    def __post_init__(self) -> None:
        self.feed = Feed(self.programs, self.data)
        self.tokens = self.programs.config.batch_size * self.data.T  # per step
        peaks = [peak_flops(device) for device in self.programs.mesh.devices.flat]
        self.peak = sum(peak for peak in peaks if peak) if all(peaks) else None
        self.flops = self.programs.flops_per_token(self.data.T)
        self.validation_loss: float | None = None

    def train(self, state: TrainState, frozen: Arrays, advance: Advance) -> TrainState:
        """Train up to the last step.

        Args:
            advance: progress callback, called once per step with its metrics as one line of text.

        Raises:
            StoppedError: SIGTERM or SIGINT reached one of the processes; all have saved the same step.
            DivergedError: too many consecutive steps were bad.
            StorageError: a checkpoint could not be written.
        """
        config, start = self.programs.config, int(state.step)
        batches = self.data.batches(start, config.batch_size, self.feed.batch_rows, config.seed)
        extra: dict[str, Any] = {}
        if start == 0:
            self.validation_loss = self.loss_before
            if self.loss_before is None:
                self._validate(0, state, frozen)
            extra = {} if self.validation_loss is None else {"validation_loss_before": self.validation_loss}
        reader, profiler = _Reader(self, advance), _Profiler(self)
        with StopSignal() as signal, profiler.trace:
            for step in range(start + 1, config.steps + 1):
                tokens, segments = self.feed.to_mesh(next(batches), config.grad_accum_steps)
                stop = flag_array(self.programs.mesh, signal.requested)
                state, metrics = self.programs.step(state, frozen, tokens, segments, stop)
                is_stopped = reader.read()
                reader.put(step, metrics, extra)
                extra = {}
                is_last = step == config.steps
                if profiler.is_due(step - start, is_last):
                    reader.settle()
                    profiler.toggle(step - start, is_last)
                    reader.restart()
                if step % config.validate_every == 0 or is_last:
                    reader.settle()
                    loss = self._validate(step, state, frozen)
                    reader.add({} if loss is None else {"validation_loss": loss})
                    reader.restart()
                self.checkpoints.check()
                if is_stopped or is_last or step % config.save_every == 0:
                    # Metrics first: a run that is stopped here must not count a step as done without its metrics.
                    is_stopped = reader.read() or is_stopped
                    if self.metrics is not None:
                        self.metrics.upload()
                    if self.save_last or not is_last:
                        self.checkpoints.save(step, state, self.facts | {"step": step, "tokens": step * self.tokens})
                        self.report(f"saving checkpoint at step {step:,}")
                    reader.restart()
                    if is_stopped and not is_last:
                        self.checkpoints.finish()
                        raise StoppedError(f"stopped at step {step}, which is saved: run the same command again")
            self.checkpoints.finish()
        return state

    def _validate(self, step: int, state: TrainState, frozen: Arrays) -> float | None:
        """Measure and report the held-out loss: nats per token, NaN if the model has diverged; None without text."""
        self.validation_loss = self.feed.measure(state.trained, frozen).mean
        if self.validation_loss is not None:
            self.report(f"validation loss {self.validation_loss:.4f} at step {step:,}")
        return self.validation_loss


class _Profiler:
    """Traces the steps after the third of this process, and prints where their time goes."""

    def __init__(self, loop: Loop):
        self.folder, self.report = loop.profile or Path(), loop.report
        self.steps = loop.programs.config.profile if loop.profile else 0
        self.trace = contextlib.ExitStack()  # also ends the trace if the loop raises
        self.is_tracing = False

    def is_due(self, done: int, is_last: bool) -> bool:
        """Whether to start or end the trace after ``done`` steps of this process."""
        ends = is_last or done == AFTER + self.steps
        return self.steps > 0 and (ends if self.is_tracing else done == AFTER or (is_last and done < AFTER))

    def toggle(self, done: int, is_last: bool) -> None:
        """Start or end the trace. The devices must be idle."""
        try:
            if self.is_tracing:
                self.is_tracing = False
                self.trace.close()
                for table in tables(summarise(self.folder), done - AFTER):
                    table.render(console(is_stderr=True))
                self.report(f"profile written to {self.folder}")
            elif is_last:
                self.report(f"warning: no profile: only {done} steps were left, and profiling starts after the third")
            else:
                self.trace.enter_context(trace(self.folder))
                self.is_tracing = True
        except (OSError, RuntimeError) as error:  # training is worth more than its profile
            self.steps = 0
            self.report(f"warning: no profile: {error}")


class _Reader:
    """Holds the metrics of the last step on the device until they are read, which waits for that step."""

    def __init__(self, loop: Loop, advance: Advance):
        self.loop, self.advance = loop, advance
        self.pending: tuple[int, dict[str, jax.Array], dict[str, Any]] | None = None
        self.started = time.perf_counter()
        self.seconds: float | None = None

    def settle(self) -> None:
        """Wait for the pending step and take its time, so that what follows does not count as part of it."""
        jax.block_until_ready(self.pending)
        if self.pending is not None and self.seconds is None:
            self.seconds = time.perf_counter() - self.started

    def restart(self) -> None:
        """Count time from here as that of the next step."""
        self.started = time.perf_counter()

    def put(self, step: int, metrics: dict[str, jax.Array], extra: dict[str, Any]) -> None:
        self.pending = (step, metrics, dict(extra))

    def add(self, values: dict[str, Any]) -> None:
        if self.pending is not None:
            self.pending[2].update(values)

    def read(self) -> bool:
        """Log the pending step. Returns True if a process had received a stop signal when the step was dispatched."""
        if self.pending is None:
            return False
        (step, metrics, extra), self.pending = self.pending, None
        values = {name: array.item() for name, array in jax.device_get(metrics).items()}
        is_stopped = bool(values.pop("stop"))
        seconds, self.seconds = self.seconds or time.perf_counter() - self.started, None
        self.restart()
        loop = self.loop
        rate = loop.tokens / seconds
        mfu = rate * loop.flops / loop.peak if loop.peak else None
        line = {"step": step, **values, "tokens": step * loop.tokens, "tokens_per_second": rate, "mfu": mfu}
        if loop.metrics is not None:
            loop.metrics.write(finite(line | extra))
        self.advance(1, describe_step(line, loop.validation_loss))
        if values["skipped"] >= loop.programs.config.skip_limit:
            loop.checkpoints.finish()
            raise DivergedError(
                f"step {step}: {values['skipped']} bad steps in a row (loss {values['loss']:.4g}, gradient norm"
                f" {values['gradient_norm']:.4g}): the last good checkpoint is kept: check the data, or start a new run"
                " from this one (--model RUN) with a lower learning rate"
            )
        return is_stopped


def describe_step(metrics: Mapping[str, Any], validation_loss: float | None) -> str:
    """The metrics of a step as one line of text.

    Args:
        metrics: the step's line of ``metrics.jsonl``.
        validation_loss: the newest one.
    """
    rates = {name.removeprefix("learning_rate_"): v for name, v in metrics.items() if name.startswith("learning_rate_")}
    if len(set(rates.values())) == 1:
        rate = f"{next(iter(rates.values())):.2e}"
    else:
        rate = ", ".join(f"{group} {value:.2e}" for group, value in rates.items())
    parts = [f"loss {metrics['loss']:.4f}"]
    parts += [] if validation_loss is None else [f"validation loss {validation_loss:.4f}"]
    parts += [f"learning rate {rate}", f"gradient norm {metrics['gradient_norm']:.2f}"]
    parts += [f"{metrics['skipped']} bad steps in a row"] if metrics["skipped"] else []
    parts += [f"{metrics['tokens_per_second']:,.0f} tokens/s"]
    parts += [] if metrics["mfu"] is None else [f"MFU {metrics['mfu']:.1%}"]
    return " · ".join(parts)
