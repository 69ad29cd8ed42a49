"""Batches in an order that depends on the seed and the step alone: not on processes, threads or restarts."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tli_jax.cli.config import Recipe
from tli_jax.cli.values import Source
from tli_jax.data.formats import need
from tli_jax.data.stream import Rules, Stream, open_stream
from tli_jax.errors import DataError, UsageError
from tli_jax.hf.encoding import Tokenizer
from tli_jax.models.config import LlamaConfig


class Batch(NamedTuple):
    """Rows of a batch.

    Attributes:
        tokens: ``[R, T + 1]`` int32; row by row what goes in (all but the last) and what is to come out (all but the
            first). Rows that only fill up a batch of the validation are all -1.
        segments: ``[R, T + 1]`` int32, which document of its window a token belongs to: 0, 1, … The first token of a
            document follows from nothing, so it is never a target.
    """

    tokens: np.ndarray
    segments: np.ndarray


@dataclasses.dataclass(frozen=True)
class Windows:
    """``count`` windows of a stream, from window ``first``: window i is tokens i*T to (i + 1)*T, the last included."""

    stream: Stream
    T: int
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens and segments of window ``index``, ``[2, T + 1]`` int32."""
        start = (self.first + index) * self.T
        tokens = self.stream.ids[start : start + self.T + 1].astype(np.int32)
        begins = np.zeros_like(tokens)
        begins[self._starts(start + 1, start + self.T + 1) - start] = 1
        return np.stack([tokens, np.cumsum(begins, dtype=np.int32)])

    def targets(self) -> np.ndarray:
        """Ids of all targets of these windows, in order."""
        start, end = self.first * self.T + 1, (self.first + self.count) * self.T + 1
        is_target = np.ones(end - start, bool)
        is_target[self._starts(start, end) - start] = False
        return self.stream.ids[start:end][is_target]

    def _starts(self, start: int, end: int) -> np.ndarray:
        """Positions from ``start`` to ``end`` at which documents start."""
        starts = self.stream.starts
        return starts[np.searchsorted(starts, start) : np.searchsorted(starts, end)]


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run trains and is validated on, open for random access.

    Attributes:
        digest: sha256 over all that content and order depend on, but for batch size and seed.
        tokens: in all training sources, what is kept out of them for validation included.
        notes: one line each: what was left out, or is not as it may seem.
        repeated: one line each: which sources training reads more than once.
        sources: digest of each source, those of validation last.
        training: windows a source, with its weight.
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
        """Windows to train on, in all sources."""
        return sum(len(windows) for windows, _ in self.training)

    @property
    def validation_windows(self) -> int:
        return sum(len(windows) for windows in self.held_out)

    def check_enough(self, batch_size: int) -> None:
        """Refuse to train on less than a batch.

        Raises:
            DataError: there are fewer windows than rows in a batch.
        """
        if self.windows < batch_size:
            raise DataError(
                f"text: {self.tokens:,} tokens, {self.windows:,} windows to train on; one batch takes"
                f" {batch_size:,} × {self.T:,} + 1 tokens: give more text, or a smaller batch_size or sequence_length"
            )

    def batches(self, start: int, batch_size: int, rows: Sequence[int], seed: int, threads: int = 2) -> Iterator[Batch]:
        """Endless: the batch of step ``start``, ``start`` + 1, …; nothing before it is read.

        Each source goes on and on in an order of its own, another one every epoch.

        Args:
            rows: which of a batch's ``batch_size`` rows to give, in which order.

        Raises:
            DataError: see ``check_enough``.
        """
        self.check_enough(batch_size)
        grain = need("grain", "grain")
        # Sources get seeds of their own, or two of equal length would be read in the same order.
        seeds = np.random.SeedSequence(seed).generate_state(len(self.training))
        endless = [
            grain.MapDataset.source(windows).shuffle(seed=int(one)).repeat()
            for (windows, _), one in zip(self.training, seeds, strict=True)
        ]
        order = _Order([weight for _, weight in self.training], batch_size, tuple(rows))
        steps = grain.MapDataset.select_from_datasets(endless, order).batch(len(rows), batch_fn=_batch)
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(steps[start:].to_iter_dataset(reading))

    def validation(self, batch_size: int, rows: Sequence[int], limit: int) -> Iterator[Batch]:
        """At most ``limit`` batches, the same each time; if they do not hold all windows, these are spread evenly.

        Args:
            rows: as for ``batches``.
        """
        count = min(self.validation_windows, limit * batch_size)
        ends = np.cumsum([len(windows) for windows in self.held_out])
        padding = np.stack([np.full(self.T + 1, -1, np.int32), np.zeros(self.T + 1, np.int32)])

        def window(index: int) -> np.ndarray:
            if index >= count:
                return padding
            index = index * self.validation_windows // count
            part = int(np.searchsorted(ends, index, side="right"))
            return self.held_out[part][index - (int(ends[part - 1]) if part else 0)]

        for first in range(0, count, batch_size):
            yield _batch([window(first + row) for row in rows])


def _batch(rows: Sequence[np.ndarray]) -> Batch:
    return Batch(*np.stack(rows, axis=1))


class _Order:
    """Which window of which source each local row is: Grain's own mixture rounds the weights, this one does not."""

    def __init__(self, weights: Sequence[Fraction], batch_size: int, rows: Sequence[int]):
        whole = math.lcm(*(weight.denominator for weight in weights))
        self.weights = [int(weight * whole) for weight in weights]
        self.batch_size, self.rows = batch_size, rows

    def __len__(self) -> int:
        return 2**60  # Grain rounds it up to whole batches, and that must still fit in 64 bits

    def __getitem__(self, index: int) -> tuple[int, int]:
        """``(source, how many of its windows came before)``."""
        step, row = divmod(index, len(self.rows))
        position, rest = step * self.batch_size + self.rows[row], sum(self.weights)
        # Of the first n places, floor(n * rest / all) go to the sources further on.
        after = position + 1
        for source, weight in enumerate(self.weights):
            later, later_after = position * (rest - weight) // rest, after * (rest - weight) // rest
            if later == later_after:
                return source, position - later
            position, after, rest = later, later_after, rest - weight
        raise AssertionError("the last source takes what is left")


def open_data(
    config: Recipe,
    model: LlamaConfig,
    tokenizer: Tokenizer | None,
    tokenizer_digest: str,
    T: int,
    cache: Path,
    known: Sequence[str] = (),
) -> Data:
    """Open all sources of a run, and tokenize what is not in the cache yet.

    Args:
        tokenizer_digest: of the tokenizer's files.
        T: tokens a sequence.
        cache: folder of tokenized sources; may be shared by runs.
        known: ``Data.sources`` of the run so far. A source that is gone is read from the cache by its digest.

    Raises:
        MissingInputError: a source is not there, and its tokens are not in the cache.
        DataError: a source is damaged, or too short for one window; text without a tokenizer.
        UsageError: no sources; a library is missing.
    """
    if not config.text:
        raise UsageError("text is not set: give files or folders to train on, --text FILE,FOLDER")
    bos = model.bos_token_id if config.bos else None
    eos = next(iter(model.eos_token_ids), None) if config.eos else None
    for name, one in (("bos", bos), ("eos", eos)):
        if one is not None and one >= model.vocab_size:
            raise DataError(f"config.json: {name}_token_id {one} is not in the vocabulary of {model.vocab_size:,}")
    rules = Rules(config, tokenizer, tokenizer_digest, model.vocab_size, bos, eos)
    digests = itertools.chain(known, itertools.repeat(None))
    streams = [_open(source, rules, T, cache, next(digests)) for source in config.text]
    apart = [_open(source, rules, T, cache, next(digests)) for source in config.validation_text]
    training, held_out = [], [_all_windows(stream, T) for stream in apart]
    weights = [Fraction(str(source.weight)) for source in config.text]
    for stream, weight in zip(streams, weights, strict=True):
        windows = _all_windows(stream, T)
        kept_out = 0 if apart else _count_held_out(len(windows), config.validation_fraction)
        training.append((dataclasses.replace(windows, count=len(windows) - kept_out), weight))
        if kept_out:
            held_out.append(Windows(stream, T, len(windows) - kept_out, kept_out))
    notes = [note for stream in streams + apart for note in stream.notes]
    repeated = []
    for stream, (windows, weight) in zip(streams, training, strict=True):
        epochs = config.steps * config.batch_size * weight / sum(weights) / len(windows)
        if epochs > 1:
            repeated.append(f"{stream.path}: is read {float(epochs):.1f} times in {config.steps:,} steps")
    for stream in streams + apart:
        if not len(stream.starts):
            notes.append(f"warning: {stream.path}: these ids have no BOS or EOS in them, so they count as one document")
    content = rules.to_json() | {
        "T": T,
        "validation_fraction": None if apart else config.validation_fraction,
        "sources": [[stream.digest, str(weight)] for stream, weight in zip(streams, weights, strict=True)],
        "validation": [stream.digest for stream in apart],
    }
    return Data(
        digest=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        sources=tuple(stream.digest for stream in streams + apart),
        tokens=sum(len(stream.ids) for stream in streams),
        notes=tuple(notes),
        repeated=tuple(repeated),
        T=T,
        training=tuple(training),
        held_out=tuple(held_out),
    )


def _open(source: Source, rules: Rules, T: int, cache: Path, known: str | None) -> Stream:
    stream = open_stream(Path(source.path), rules, cache, known)
    if len(stream.ids) <= T:
        raise DataError(
            f"{source.path}: {len(stream.ids):,} tokens, one window takes {T + 1:,}:"
            " give more text, or a smaller sequence_length"
        )
    return stream


def _all_windows(stream: Stream, T: int) -> Windows:
    return Windows(stream, T, 0, (len(stream.ids) - 1) // T)


def _count_held_out(windows: int, share: float) -> int:
    """At least one of what is to be shared, and at least one left to train on."""
    return min(max(round(windows * share), 1), windows - 1) if share else 0
