"""The loop around the step: data in, metrics out, validation, checkpoints, and when to stop. It never waits for a step
that it does not have to: what step n measured is read while step n + 1 runs."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tli_jax.cli.progress import Advance
from tli_jax.data.batches import Batch, Data
from tli_jax.distributed.mesh import batch_sharding, local_rows, param_sharding
from tli_jax.distributed.processes import StopSignal, flag_array
from tli_jax.errors import DataError, DivergedError, StoppedError
from tli_jax.growth.plan import is_residual_output
from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.hf.load import load_array
from tli_jax.training.checkpoints import Checkpoints
from tli_jax.training.freezing import Arrays
from tli_jax.training.metrics import Metrics
from tli_jax.training.step import Trainer, TrainState

# Dense bf16 FLOP/s of a device, as their makers state them, by what JAX calls them. MFU is against these.
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
    """FLOP/s of a device, None where nobody stated them."""
    kinds = [kind for kind in _PEAK_FLOPS if device.device_kind.startswith(kind)]
    return _PEAK_FLOPS[max(kinds, key=len)] if kinds else None


def load(trainer: Trainer, weights: Checkpoint) -> tuple[Arrays, Arrays]:
    """What trains, in ``param_dtype``, and what does not, as stored, or in float32 where layers of one stack are stored
    in different dtypes: from safetensors straight to its shards.

    Raises:
        DataError: a file has become shorter.
    """
    parts: tuple[Arrays, Arrays] = ({}, {})
    for leaf in trainer.param_specs:
        dtype = trainer.config.param_dtype if leaf.trains else None
        sharding = param_sharding(trainer.mesh, leaf.dims)
        parts[not leaf.trains][leaf.name] = load_array(weights.stack(leaf.tensor, leaf.layers), sharding, dtype)
    return parts


def restore(
    trainer: Trainer, checkpoints: Checkpoints, dtypes: Mapping[str, str], report: Callable[[str], None]
) -> tuple[TrainState, Arrays] | None:
    """The newest good checkpoint on this mesh, as state and frozen tensors; None where there is none.

    Args:
        dtypes: of the frozen leaves.
        report: told of each checkpoint that is damaged.

    Raises:
        DataError: there are checkpoints, and none is good; or the frozen tensors are damaged.
    """
    newest = checkpoints.restore_newest(trainer.abstract_state(), report)
    if newest is None:
        return None
    params = trainer.abstract_params(lambda leaf: dtypes[leaf.name])
    frozen = checkpoints.restore_frozen(
        {leaf.name: params[leaf.name] for leaf in trainer.param_specs if not leaf.trains}
    )
    if frozen is None:
        raise DataError("checkpoints/frozen is gone: restore the run folder from a copy, or use another run folder")
    return newest[1], frozen


class Measured(NamedTuple):
    """Cross-entropy summed over ``tokens`` targets, in nats."""

    nats: float
    tokens: int

    @classmethod
    def total(cls, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> "Measured":
        """The sum of batches, as the device gives them: fp32 and int32, in which the sum would drift and overflow."""
        return cls(math.fsum(float(nats) for nats, _ in parts), sum(int(count) for _, count in parts))

    @property
    def mean(self) -> float | None:
        """Nats per token, which may be NaN; None without targets."""
        return self.nats / self.tokens if self.tokens else None

    @property
    def loss(self) -> float | None:
        """Nats per token; None without targets.

        Raises:
            DataError: it is not finite.
        """
        if not math.isfinite(self.nats):
            raise DataError(
                f"the loss is {self.nats}: the weights hold NaN or Inf, or overflow in this dtype: check them with"
                " python -m tli_jax.upscale, or set --dtypes compute=float32"
            )
        return self.mean


class Feed:
    """The batches of a run as they go to the mesh: each process has its rows of them."""

    def __init__(self, trainer: Trainer, data: Data):
        config, mesh = trainer.config, trainer.mesh
        self.trainer, self.data = trainer, data
        self.part = config.batch_size // config.grad_accum_steps
        # Rows of one part that this process holds, and the same in every part of the whole batch.
        self.local = local_rows(batch_sharding(mesh, ("B",)), self.part)
        self.rows = [part * self.part + row for part in range(config.grad_accum_steps) for row in self.local]

    def to_mesh(self, batch: Batch, parts: int) -> tuple[jax.Array, jax.Array]:
        """Rows of this process, ``[A * R, T+1]``, as its share of global ``[A, B, T+1]`` arrays."""
        position = {row: i for i, row in enumerate(self.local)}

        def share(rows: np.ndarray) -> jax.Array:
            split = rows.reshape(parts, -1, rows.shape[-1])

            def piece(index: Any) -> np.ndarray:
                return split[index[0]][:, [position[row] for row in range(*index[1].indices(self.part))]]

            shape = (parts, self.part, rows.shape[-1])
            return jax.make_array_from_callback(shape, self.trainer.batch_sharding, piece)

        return share(batch.tokens), share(batch.segments)

    def measure(
        self,
        trained: Arrays,
        frozen: Arrays,
        batches: int | None = None,
        advance: Advance = lambda amount, note="", /: None,
    ) -> Measured:
        """Loss on the held-out windows.

        Args:
            batches: at most so many; by default as configured.
            advance: progress callback, in batches.
        """
        sums = []
        for batch in self.data.validation(self.part, self.local, batches or self.trainer.config.validation_batches):
            tokens, segments = self.to_mesh(batch, 1)
            sums.append(self.trainer.validate(trained, frozen, tokens[0], segments[0]))
            jax.block_until_ready(sums[-2:-1])  # or all batches of a long text would wait on the device
            advance(1)
        return Measured.total(jax.device_get(sums))

    def validate(self, trained: Arrays, frozen: Arrays, batches: int | None = None) -> float | None:
        """Mean loss on the held-out windows, nats per token; None if there are none. See ``measure``.

        Raises:
            DataError: it is not finite.
        """
        return self.measure(trained, frozen, batches).loss


def contributions(feed: Feed, trained: Arrays, frozen: Arrays, batches: int) -> dict[str, float]:
    """How much the loss on what was kept out of training rises when an injected layer is skipped, by its number.

    A layer whose residual outputs are zero is skipped.

    Args:
        batches: to measure on, at most.
    """
    trainer, arrays = feed.trainer, trained | frozen
    whole = feed.validate(trained, frozen, batches)
    found = {}
    for number, is_injected in enumerate(trainer.layout.injected):
        if not is_injected or whole is None:
            continue
        outputs = [leaf for leaf in trainer.param_specs if number in leaf.layers and is_residual_output(leaf.tensor)]
        without = {leaf.name: arrays[leaf.name].at[leaf.layers.index(number)].set(0) for leaf in outputs}
        some, others = ({n: without.get(n, array) for n, array in part.items()} for part in (trained, frozen))
        loss = feed.validate(some, others, batches)
        assert loss is not None, "there was one with the layer"
        found[str(number)] = loss - whole
    return found


@dataclasses.dataclass
class Loop:
    """All that a run works with. ``metrics`` is None in every process but the first."""

    trainer: Trainer
    data: Data
    checkpoints: Checkpoints
    metrics: Metrics | None
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        config, mesh = self.trainer.config, self.trainer.mesh
        self.feed = Feed(self.trainer, self.data)
        self.tokens = config.batch_size * self.data.T
        peaks = [peak_flops(device) for device in mesh.devices.flat]
        self.peak = sum(peak for peak in peaks if peak) if all(peaks) else None
        self.flops = self.trainer.flops_per_token(self.data.T)

    def train(self, state: TrainState, frozen: Arrays, advance: Advance) -> TrainState:
        """Run up to the last step.

        Raises:
            StoppedError: SIGTERM or SIGINT reached one of the processes; all have saved the same step.
            DivergedError: too many bad steps in a row.
            StorageError: a checkpoint could not be written.
        """
        config, start = self.trainer.config, int(state.step)
        batches = self.data.batches(start, config.batch_size, self.feed.rows, config.seed)
        extra: dict[str, Any] = {}
        # That of a model which diverges may be NaN, and is then logged as null.
        if start == 0 and (loss := self.feed.measure(state.trained, frozen).mean) is not None:
            extra = {"validation_loss_before": loss}
        reader = _Reader(self, advance)
        with StopSignal() as signal:
            for step in range(start + 1, config.steps + 1):
                tokens, segments = self.feed.to_mesh(next(batches), config.grad_accum_steps)
                stop = flag_array(self.trainer.mesh, signal.requested)
                state, measured = self.trainer.step(state, frozen, tokens, segments, stop)
                is_told = reader.read()
                reader.put(step, measured, extra)
                extra = {}
                is_last = step == config.steps
                if step % config.validate_every == 0 or is_last:
                    reader.settle()
                    loss = self.feed.measure(state.trained, frozen).mean
                    reader.add({} if loss is None else {"validation_loss": loss})
                    reader.restart()
                self.checkpoints.check()
                if is_told or is_last or step % config.save_every == 0:
                    is_told = reader.read() or is_told  # written down before what would make it look done
                    if self.metrics is not None:
                        self.metrics.mirror()
                    self.checkpoints.save(step, state, self.facts | {"step": step, "tokens": step * self.tokens})
                    reader.restart()
                    if is_told and not is_last:
                        self.checkpoints.finish()
                        raise StoppedError(f"stopped at step {step}, which is saved: run the same command again")
        self.checkpoints.finish()
        return state


class _Reader:
    """Holds what the last step measured until it is asked for: asking waits for that step."""

    def __init__(self, loop: Loop, advance: Advance):
        self.loop, self.advance = loop, advance
        self.pending: tuple[int, dict[str, jax.Array], dict[str, Any]] | None = None
        self.at = time.perf_counter()
        self.seconds: float | None = None

    def settle(self) -> None:
        """Wait for the step that waits, as what comes now is not to count as its time."""
        jax.block_until_ready(self.pending)
        self.seconds = time.perf_counter() - self.at

    def restart(self) -> None:
        """From here on counts as the time of the next step."""
        self.at = time.perf_counter()

    def put(self, step: int, measured: dict[str, jax.Array], extra: dict[str, Any]) -> None:
        self.pending = (step, measured, dict(extra))

    def add(self, values: dict[str, Any]) -> None:
        if self.pending is not None:
            self.pending[2].update(values)

    def read(self) -> bool:
        """Write down the step that waits; whether a process was told to stop by then."""
        if self.pending is None:
            return False
        (step, measured, extra), self.pending = self.pending, None
        values = {name: array.item() for name, array in jax.device_get(measured).items()}
        is_told = bool(values.pop("stop"))
        seconds, self.seconds = self.seconds or time.perf_counter() - self.at, None
        self.restart()
        loop = self.loop
        rate = loop.tokens / seconds
        mfu = rate * loop.flops / loop.peak if loop.peak else None
        line = {"step": step, **values, "tokens": step * loop.tokens, "tokens_per_second": rate, "mfu": mfu}
        if loop.metrics is not None:
            line |= extra
            no_number = {k: None for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
            loop.metrics.write(line | no_number)
        shown = f"loss {values['loss']:.3f} · {rate:,.0f} tokens/s"
        self.advance(1, shown + (f" · MFU {mfu:.1%}" if mfu is not None else ""))
        if values["skipped"] >= loop.trainer.config.skip_limit:
            loop.checkpoints.finish()
            raise DivergedError(
                f"step {step}: {values['skipped']} bad steps in a row (loss {values['loss']:.4g}, gradient norm"
                f" {values['gradient_norm']:.4g}): the last good checkpoint is kept; look at the data, or start another"
                " run from it (--model RUN) with a lower learning rate"
            )
        return is_told
