"""Batches in an order that depends on seed and step alone, not on processes, threads or restarts."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tli_jax.cli.train_config import Reading, Recipe
from tli_jax.data.formats import need
from tli_jax.data.shards import sha256_json
from tli_jax.data.stream import Stream, open_stream
from tli_jax.data.tokenization import Rules
from tli_jax.errors import DataError, UsageError
from tli_jax.hf.encoding import Tokenizer
from tli_jax.models.config import LlamaConfig

_MIN_LENGTH = 128  # of the window of short texts; attention kernels need multiples of it


class Batch(NamedTuple):
    """Rows of a batch.

    Attributes:
        tokens: ``[R, T + 1]`` int32: inputs (all but the last) and targets (all but the first). -1 is padding.
        segments: ``[R, T + 1]`` int32: index, from 0, of the document in the window that a token belongs to. The first
            token of a document is never a target.
    """

    tokens: np.ndarray
    segments: np.ndarray


@dataclasses.dataclass(frozen=True)
class Windows:
    """``count`` windows of a stream, from window ``first``. Window i covers tokens i*T to (i + 1)*T inclusive."""

    stream: Stream
    T: int
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens and segments of a window, ``[2, T + 1]`` int32, padded if the stream ends within it."""
        start = (self.first + index) * self.T
        tokens, is_start = self.stream.read(start, start + self.T + 1)
        is_start[0] = False  # segments count from 0
        padding = (0, self.T + 1 - len(tokens))
        segments = np.pad(np.cumsum(is_start, dtype=np.int32), padding, mode="edge")
        return np.stack([np.pad(tokens, padding, constant_values=-1), segments])

    def targets(self) -> np.ndarray:
        """Ids of all targets of these windows, in order."""
        start = self.first * self.T + 1
        ids, is_start = self.stream.read(start, (self.first + self.count) * self.T + 1)
        return ids[~is_start]


@dataclasses.dataclass(frozen=True)
class Data:
    """Training and validation data, open for random access.

    Attributes:
        digest: sha256 over everything that content and order depend on, apart from batch size and seed.
        sources: digest of each source, validation sources last.
        tokens: tokens in all training sources, held-out ones included.
        notes: one line for each thing that was skipped or may surprise.
        repeated: one line for each source that training reads more than once.
        training: windows of each source, and its weight.
    """

    digest: str
    sources: tuple[str, ...]
    tokens: int
    notes: tuple[str, ...]
    repeated: tuple[str, ...]
    T: int
    training: tuple[tuple[Windows, Fraction], ...]
    held_out: tuple[Windows, ...]

    @property
    def windows(self) -> int:
        """Training windows in all sources."""
        return sum(len(windows) for windows, _ in self.training)

    @property
    def validation_windows(self) -> int:
        return sum(len(windows) for windows in self.held_out)

    def check_enough(self, batch_size: int) -> None:
        """Raises DataError: there are fewer windows than a batch has rows."""
        if self.windows < batch_size:
            raise DataError(
                f"text: {self.tokens:,} tokens make {self.windows:,} training windows, a batch needs {batch_size:,} of"
                f" {self.T:,} + 1 tokens: give more text, or lower batch_size or sequence_length"
            )

    def batches(self, start: int, batch_size: int, rows: Sequence[int], seed: int, threads: int = 2) -> Iterator[Batch]:
        """Endless training batches from step ``start`` on; nothing before it is read.

        Each source repeats in an order of its own, which changes every epoch.

        Args:
            rows: which of the ``batch_size`` rows to return, in this order.

        Raises:
            DataError: see ``check_enough``.
        """
        self.check_enough(batch_size)
        grain = need("grain")
        # With one seed for all, sources of equal length would be read in the same order.
        seeds = np.random.SeedSequence(seed).generate_state(len(self.training))
        endless = [
            grain.MapDataset.source(windows).shuffle(seed=int(source_seed)).repeat()
            for (windows, _), source_seed in zip(self.training, seeds, strict=True)
        ]
        order = _MixtureOrder([weight for _, weight in self.training], batch_size, tuple(rows))
        steps = grain.MapDataset.select_from_datasets(endless, order).batch(len(rows), batch_fn=_batch)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(steps[start:].to_iter_dataset(options))

    def validation(self, batch_size: int, rows: Sequence[int], limit: int) -> Iterator[Batch]:
        """At most ``limit`` batches, always the same. If they cannot hold all windows, they sample them evenly.

        Args:
            rows: see ``batches``.
        """
        count = min(self.validation_windows, limit * batch_size)
        ends = np.cumsum([len(windows) for windows in self.held_out])
        padding = np.stack([np.full(self.T + 1, -1, np.int32), np.zeros(self.T + 1, np.int32)])

        def window(index: int) -> np.ndarray:
            if index >= count:
                return padding
            index = index * self.validation_windows // count
            source = int(np.searchsorted(ends, index, side="right"))
            return self.held_out[source][index - (int(ends[source - 1]) if source else 0)]

        for first in range(0, count, batch_size):
            yield _batch([window(first + row) for row in rows])


def _batch(rows: Sequence[np.ndarray]) -> Batch:
    return Batch(*np.stack(rows, axis=1))


class _MixtureOrder:
    """Which window of which source each row is. Grain's own mixture rounds the weights, this one is exact."""

    def __init__(self, weights: Sequence[Fraction], batch_size: int, rows: Sequence[int]):
        scale = math.lcm(*(weight.denominator for weight in weights))
        self.weights = [int(weight * scale) for weight in weights]
        self.batch_size, self.rows = batch_size, rows

    def __len__(self) -> int:
        return 2**60  # Grain rounds it up to complete batches, which must still fit in 64 bits

    def __getitem__(self, index: int) -> tuple[int, int]:
        """``(source, number of its windows that came before)``."""
        step, row = divmod(index, len(self.rows))
        position, rest = step * self.batch_size + self.rows[row], sum(self.weights)
        # Of the first n positions, floor(n * later weights / rest) go to the later sources.
        after = position + 1
        for source, weight in enumerate(self.weights):
            later, later_after = position * (rest - weight) // rest, after * (rest - weight) // rest
            if later == later_after:
                return source, position - later
            position, after, rest = later, later_after, rest - weight
        raise AssertionError("the last source takes the rest")


def open_data(
    config: Recipe,
    model: LlamaConfig,
    tokenizer: Tokenizer | None,
    tokenizer_digest: str,
    T: int,
    cache: Path,
    known_digests: Sequence[str] = (),
    is_checked: bool = False,
) -> Data:
    """Open all sources of a run. Tokenize those that are not in the cache yet.

    Args:
        tokenizer_digest: digest of the tokenizer's files.
        T: sequence length.
        cache: folder of tokenized sources, which runs may share.
        known_digests: ``Data.sources`` of an earlier start of this run. A source that is gone is read from the cache.
        is_checked: they are those of the first process, which has checked sources and cache, see ``open_stream``.

    Raises:
        MissingInputError: a source does not exist, and its tokens are not in the cache.
        DataError: a source is damaged or shorter than one window, or is text and there is no tokenizer.
        UsageError: no sources, or a library is not installed.
    """
    if not config.text:
        raise UsageError("text is not set: give files or folders to train on, --text FILE,FOLDER")
    rules = Rules.of_model(config, model, tokenizer, tokenizer_digest)
    paths = [Path(source.path) for source in (*config.text, *config.validation_text)]
    digests = itertools.chain(known_digests, itertools.repeat(None))
    options = {"is_checked": is_checked, "verify": config.verify}
    streams = [open_stream(path, rules, cache, next(digests), **options) for path in paths]
    for stream in streams:
        if len(stream) <= T:
            raise DataError(
                f"{stream.path}: has {len(stream):,} tokens, one window takes {T + 1:,}:"
                " give more text, or a smaller sequence_length"
            )
    train_streams, validation_streams = streams[: len(config.text)], streams[len(config.text) :]
    training, held_out = [], [_all_windows(stream, T) for stream in validation_streams]
    weights = [Fraction(str(source.weight)) for source in config.text]
    repeated = []
    for stream, weight in zip(train_streams, weights, strict=True):
        windows = _all_windows(stream, T)
        excluded = 0 if validation_streams else _count_held_out(len(windows), config.validation_fraction)
        training.append((dataclasses.replace(windows, count=len(windows) - excluded), weight))
        if excluded:
            held_out.append(Windows(stream, T, len(windows) - excluded, excluded))
        epochs = config.steps * config.batch_size * weight / sum(weights) / (len(windows) - excluded)
        if epochs > 1:
            repeated.append(f"{stream.path}: is read {float(epochs):.1f} times in {config.steps:,} steps")
    # The keys are part of the digest, so they stay as they were first named.
    content = rules.to_json() | {
        "T": T,
        "validation_share": None if validation_streams else config.validation_fraction,
        "sources": [[stream.digest, str(weight)] for stream, weight in zip(train_streams, weights, strict=True)],
        "validation": [stream.digest for stream in validation_streams],
    }
    return Data(
        digest=sha256_json(content),
        sources=tuple(stream.digest for stream in streams),
        tokens=sum(len(stream) for stream in train_streams),
        notes=tuple(note for stream in streams for note in stream.notes),
        repeated=tuple(repeated),
        T=T,
        training=tuple(training),
        held_out=tuple(held_out),
    )


def open_evaluation_data(
    paths: Sequence[Path],
    config: Reading,
    model: LlamaConfig,
    tokenizer: Tokenizer | None,
    tokenizer_digest: str,
    T: int,
    cache: Path,
    limit: int | None = None,
) -> list[Data]:
    """Open sources for evaluation alone: the first ``limit`` windows of each, or all, as ``Data.held_out``.

    A source shorter than a window becomes one padded window. If all of them are, ``Data.T`` is smaller than ``T``.

    Raises:
        MissingInputError, DataError, UsageError: see ``open_data``.
    """
    rules = Rules.of_model(config, model, tokenizer, tokenizer_digest)
    streams = [open_stream(path, rules, cache, verify=config.verify) for path in paths]
    longest = max((len(stream) - 1 for stream in streams), default=T)
    T = min(T, max(_MIN_LENGTH, 1 << (longest - 1).bit_length()))
    data = []
    for stream in streams:
        windows = _all_windows(stream, T)
        count = min(max(1, len(windows)), limit or len(stream))
        held_out = dataclasses.replace(windows, count=count)
        data.append(Data("", (stream.digest,), len(stream), stream.notes, (), T, (), (held_out,)))
    return data


def _all_windows(stream: Stream, T: int) -> Windows:
    return Windows(stream, T, 0, (len(stream) - 1) // T)


def _count_held_out(windows: int, fraction: float) -> int:
    """Hold out at least one window if any, and leave at least one to train on."""
    return min(max(round(windows * fraction), 1), windows - 1) if fraction else 0
