"""Batches on the mesh, and the loss on held-out text."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tli_jax.cli.progress import Advance
from tli_jax.data.batches import Batch, Data
from tli_jax.distributed.mesh import batch_sharding, local_rows
from tli_jax.errors import DataError
from tli_jax.growth.rows import is_residual_output
from tli_jax.training.freezing import Arrays
from tli_jax.training.step import Programs


class Measured(NamedTuple):
    """Cross-entropy in nats, summed over ``tokens`` targets."""

    nats: float
    tokens: int

    @classmethod
    def total(cls, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> "Measured":
        """Sum over batches on the host, because float32 and int32 sums on the device would drift and overflow."""
        return cls(math.fsum(float(nats) for nats, _ in parts), sum(int(count) for _, count in parts))

    @property
    def mean(self) -> float | None:
        """Nats per token, possibly NaN; None without targets."""
        return self.nats / self.tokens if self.tokens else None

    @property
    def loss(self) -> float | None:
        """Nats per token; None without targets.

        Raises:
            DataError: it is not finite.
        """
        if not math.isfinite(self.nats):
            raise DataError(
                f"the loss is {self.nats}: the weights contain NaN or Inf, or overflow in this dtype: check them with"
                " python -m tli_jax.upscale, or set --dtypes compute=float32"
            )
        return self.mean


class Feed:
    """The batches of a run as global arrays on the mesh. Each process supplies its own rows."""

    def __init__(self, programs: Programs, data: Data):
        config = programs.config
        self.programs, self.data = programs, data
        self.rows = config.batch_size // config.grad_accum_steps  # per microbatch
        # Rows that this process holds, of each microbatch and of the complete batch.
        self.local = local_rows(batch_sharding(programs.mesh, ("B",)), self.rows)
        self.batch_rows = [i * self.rows + row for i in range(config.grad_accum_steps) for row in self.local]

    def to_mesh(self, batch: Batch, microbatches: int) -> tuple[jax.Array, jax.Array]:
        """The rows of this process, ``[A * R, T+1]``, as its part of global ``[A, B, T+1]`` arrays."""
        position = {row: i for i, row in enumerate(self.local)}

        def to_global(rows: np.ndarray) -> jax.Array:
            split = rows.reshape(microbatches, -1, rows.shape[-1])

            def shard(index: Any) -> np.ndarray:
                return split[index[0]][:, [position[row] for row in range(*index[1].indices(self.rows))]]

            shape = (microbatches, self.rows, rows.shape[-1])
            return jax.make_array_from_callback(shape, self.programs.batch_sharding, shard)

        return to_global(batch.tokens), to_global(batch.segments)

    def measure(
        self,
        trained: Arrays,
        frozen: Arrays,
        batches: int | None = None,
        advance: Advance = lambda amount, note="", /: None,
    ) -> Measured:
        """Loss on the held-out windows.

        Args:
            batches: upper limit; by default ``validation_batches`` of the configuration.
            advance: progress callback, called once per batch.
        """
        limit = batches or self.programs.config.validation_batches
        sums = []
        for batch in self.data.validation(self.rows, self.local, limit):
            tokens, segments = self.to_mesh(batch, 1)
            sums.append(self.programs.validate(trained, frozen, tokens[0], segments[0]))
            jax.block_until_ready(sums[-2:-1])  # or all batches of a long text would be on the device at once
            advance(1)
        return Measured.total(jax.device_get(sums))

    def validate(self, trained: Arrays, frozen: Arrays, batches: int | None = None) -> float | None:
        """Mean loss on the held-out windows in nats per token; None if there are none.

        Raises:
            DataError: it is not finite.
        """
        return self.measure(trained, frozen, batches).loss


def contributions(feed: Feed, trained: Arrays, frozen: Arrays, batches: int) -> dict[str, float]:
    """By how much the held-out loss rises when an injected layer is skipped, by layer index.

    Zeroing a layer's residual outputs skips it.

    Args:
        batches: upper limit of batches to measure on.
    """
    programs, arrays = feed.programs, trained | frozen
    loss = feed.validate(trained, frozen, batches)
    rises = {}
    for layer, is_injected in enumerate(programs.layout.injected):
        if not is_injected or loss is None:
            continue
        outputs = [spec for spec in programs.param_specs if layer in spec.layers and is_residual_output(spec.tensor)]
        zeroed = {spec.name: arrays[spec.name].at[spec.layers.index(layer)].set(0) for spec in outputs}
        without = [{name: zeroed.get(name, x) for name, x in part.items()} for part in (trained, frozen)]
        loss_without = feed.validate(without[0], without[1], batches)
        assert loss_without is not None, "the same windows as with the layer"
        rises[str(layer)] = loss_without - loss
    return rises
