"""The order of the data: independent of how it is read, each window once per epoch, mixed by weight."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tli_jax.cli.train_config import TrainConfig
from tli_jax.data.batches import _MixtureOrder, open_evaluation_data
from tli_jax.errors import DataError, UsageError

pytest.importorskip("grain", reason="grain is not installed")
T = 16


@pytest.fixture
def ids(tmp_path):
    """Writes a stream whose tokens encode their position. None of them is BOS."""

    def write(name, windows, start=100, extra=1):
        np.save(tmp_path / name, np.arange(start, start + windows * T + extra, dtype=np.uint16))
        return tmp_path / name

    return write


def firsts(batches, steps, start=100):
    """Window index of each row of the first steps."""
    return [((batch.tokens[:, 0] - start) // T).tolist() for batch in itertools.islice(batches, steps)]


@pytest.fixture
def data(ids, opened):
    return opened(ids("a.npy", 10), ids("b.npy", 21, start=100), T=T, validation_fraction=0)


def test_row_is_a_window_plus_one_token(data):
    batch = next(data.batches(0, 4, range(4), 0))
    assert batch.tokens.shape == batch.segments.shape == (4, T + 1)
    assert batch.tokens.dtype == batch.segments.dtype == np.int32
    np.testing.assert_array_equal(batch.tokens - batch.tokens[:, :1], np.tile(np.arange(T + 1), (4, 1)))
    assert ((batch.tokens[:, 0] - 100) % T == 0).all()


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[6, 7], [4, 5], [0, 1], [2, 3]], [[5], [0, 2]]])
def test_processes_read_their_rows_of_the_same_batch(data, parts):
    complete = [batch.tokens for batch in itertools.islice(data.batches(0, 8, range(8), 3), 12)]
    for rows in parts:
        for batch, full in zip(data.batches(0, 8, rows, 3), complete, strict=False):
            np.testing.assert_array_equal(batch.tokens, full[rows])


def test_resuming_continues_the_same_order(data):
    expected = firsts(data.batches(0, 4, range(4), 5), 30)
    for start in (1, 7, 25):
        assert firsts(data.batches(start, 4, range(4), 5), 5) == expected[start : start + 5]
    assert len(firsts(data.batches(10**9, 4, range(4), 5), 2)) == 2


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_threads_do_not_change_the_order(data, threads):
    assert firsts(data.batches(2, 4, range(4), 5, threads=threads), 40) == firsts(data.batches(2, 4, range(4), 5), 40)


def test_every_epoch_has_every_window_once_in_a_new_order(ids, opened):
    data = opened(ids("a.npy", 24), T=T, validation_fraction=0)
    assert (data.windows, data.validation_windows, data.tokens) == (24, 0, 24 * T + 1)
    rows = [window for step in firsts(data.batches(0, 5, range(5), 0), 48) for window in step]
    epochs = [rows[start : start + 24] for start in range(0, 240, 24)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10 and list(range(24)) not in epochs
    assert firsts(data.batches(0, 5, range(5), 1), 48) != firsts(data.batches(0, 5, range(5), 0), 48)


def test_order_of_a_seed_is_stable(ids, opened):
    # A run that resumes with a newer Grain needs the old order.
    data = opened(ids("a.npy", 10), T=T, validation_fraction=0)
    assert firsts(data.batches(0, 5, range(5), 0), 2) == [[5, 8, 9, 7, 4], [2, 1, 0, 3, 6]]


def test_sources_of_equal_length_have_different_orders(ids, opened):
    data = opened(ids("a.npy", 20), ids("b.npy", 20, start=500), T=T, validation_fraction=0)
    tokens = np.concatenate([batch.tokens[:, 0] for batch in itertools.islice(data.batches(0, 4, range(4), 0), 10)])
    one, other = tokens[tokens < 500] - 100, tokens[tokens >= 500] - 500
    assert len(one) == len(other) == 20 and (one != other).any()


def test_weights_are_exact_and_each_source_repeats_by_itself(ids, opened):
    data = opened((ids("a.npy", 5), 0.7), (ids("b.npy", 9, start=500), 0.3), T=T, validation_fraction=0)
    tokens = np.concatenate([batch.tokens[:, 0] for batch in itertools.islice(data.batches(0, 10, range(10), 0), 90)])
    one, other = tokens[tokens < 500], tokens[tokens >= 500]
    assert (len(one), len(other)) == (630, 270)
    assert set(Counter(one.tolist()).values()) == {126} and set(Counter(other.tolist()).values()) == {30}


@given(st.lists(st.fractions(min_value="1/1000", max_value=1000, max_denominator=1000), min_size=1, max_size=5))
def test_mixture_deviates_by_less_than_one_window_per_source(weights):
    order = _MixtureOrder(weights, 1, (0,))
    seen: Counter[int] = Counter()
    for index in range(100):
        source, before = order[index]
        assert before == seen[source]
        seen[source] += 1
        exact = [Fraction(weight) * (index + 1) / sum(weights) for weight in weights]
        assert all(abs(seen[i] - share) < len(weights) for i, share in enumerate(exact))


def test_segments_of_ids_start_at_bos(opened, model, tmp_path):
    ids = np.array([5, 6, model.bos_token_id, 7, model.bos_token_id, model.bos_token_id, 8] + [9] * 10)
    np.save(tmp_path / "a.npy", ids)
    for keys, expected in (
        ({}, [0, 0, 1, 1, 2, 3, 3] + [3] * 10),
        ({"isolate": False}, [0, 0, 1, 1, 2, 3, 3] + [3] * 10),  # affects attention, not targets
        ({"bos": False}, [0] * 17),
    ):
        batch = next(opened(tmp_path / "a.npy", T=T, **keys).batches(0, 1, [0], 0))
        assert batch.segments.tolist() == [expected]
    # Another file: prefetching has the first one mapped, and truncating a mapped file kills the process.
    np.save(tmp_path / "b.npy", np.roll(ids, -2))
    assert next(opened(tmp_path / "b.npy", T=T).batches(0, 1, [0], 0)).segments[0, :4].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("keys", [{}, {"bos": False}, {"eos": False}, {"bos": False, "eos": False}])
def test_segments_of_texts_are_their_documents(keys, opened, write, tokenizer, model):
    texts = ["One.", "A second one, longer.", "x", "<|endoftext|> and the last of these."]
    marks = [[model.bos_token_id] * keys.get("bos", True), [model.eos_token_ids[0]] * keys.get("eos", True)]
    stream = [(i, n) for n, text in enumerate(texts) for i in (*marks[0], *tokenizer.encode(text), *marks[1])]
    data = opened(write("a.jsonl", texts), T=len(stream) - 1, validation_fraction=0, **keys)
    batch = next(data.batches(0, 1, [0], 0))
    assert [*zip(batch.tokens[0].tolist(), batch.segments[0].tolist(), strict=True)] == stream
    firsts = {i for i in range(1, len(stream)) if stream[i][1] != stream[i - 1][1]}
    expected = [token for i, (token, _) in enumerate(stream) if i and i not in firsts]
    assert data.training[0][0].targets().tolist() == expected


def test_segments_of_a_window_count_from_zero(opened, write):
    data = opened(write("a.jsonl", [f"Document {i} of many." for i in range(60)]), T=T, validation_fraction=0)
    ((windows, _),) = data.training
    segments = np.cumsum(windows.stream.read(0, len(windows.stream))[1]) - 1
    for i in range(len(windows)):
        expected = segments[i * T : (i + 1) * T + 1]
        np.testing.assert_array_equal(windows[i][1], expected - expected[0])


def test_segments_end_at_eos_without_bos(opened, tmp_path):
    np.save(tmp_path / "a.npy", np.array([5, 3, 6, 3, 3, 8] + [9] * 10 + [3]))
    batch = next(opened(tmp_path / "a.npy", T=T, bos=False, eos=True, eos_ids=(3, 4)).batches(0, 1, [0], 0))
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2] + [3] * 12]


def test_end_of_each_source_is_held_out_of_training(ids, opened):
    data = opened(ids("a.npy", 20), ids("b.npy", 3, start=500), T=T, validation_fraction=0.1)
    assert (data.windows, data.validation_windows) == (18 + 2, 2 + 1)
    trained = {int(i) for b in itertools.islice(data.batches(0, 4, range(4), 0), 40) for i in b.tokens[:, 0]}
    held = [int(i) for batch in data.validation(2, range(2), 9) for i in batch.tokens[:, 0]]
    assert held == [100 + 18 * T, 100 + 19 * T, 500 + 2 * T, -1]
    assert trained == {100 + i * T for i in range(18)} | {500, 500 + T}


def test_validation_batch_is_padded_and_split_into_rows(ids, opened):
    data = opened(ids("a.npy", 20), T=T, validation_text=[ids("b.npy", 5, start=500)])
    assert (data.windows, data.validation_windows) == (20, 5)
    complete = list(data.validation(4, range(4), 10))
    assert [batch.tokens.shape for batch in complete] == [(4, T + 1)] * 2
    assert (complete[1].tokens[1:] == -1).all() and complete[1].tokens[0, 0] == 500 + 4 * T
    for rows in ([0, 1], [3, 2]):
        for batch, full in zip(data.validation(4, rows, 10), complete, strict=True):
            np.testing.assert_array_equal(batch.tokens, full.tokens[rows])
    assert firsts(data.validation(2, range(2), 1), 9, start=500) == [[0, 2]]
    assert list(opened(ids("a.npy", 20), T=T, validation_fraction=0).validation(4, range(4), 3)) == []


def test_too_few_tokens_are_refused_with_their_count(ids, opened):
    with pytest.raises(DataError, match=r"a\.npy: has 16 tokens, one window takes 17"):
        opened(ids("a.npy", 1, extra=0), T=T)
    data = opened(ids("a.npy", 3), T=T)
    with pytest.raises(DataError, match=r"49 tokens make 2 training windows, a batch needs 3 of 16 \+ 1 tokens"):
        data.batches(0, 3, [0], 0)
    assert len(next(data.batches(0, 2, [0], 0)).tokens) == 1


def test_missing_text_is_a_usage_error(ids, opened):
    with pytest.raises(UsageError, match="text is not set"):
        opened(T=T)


def test_digest_covers_what_content_and_order_depend_on(ids, opened):
    one, other = ids("a.npy", 8), ids("b.npy", 9)
    digest = opened(one, T=T).digest
    assert opened(one, T=T, seed=4, batch_size=2, steps=9).digest == digest
    changed = [
        opened(other, T=T),
        opened(one, other, T=T),
        opened(one, T=8),
        opened(one, T=T, validation_fraction=0.2),
        opened(one, T=T, validation_text=[other]),
        opened(one, T=T, bos=False),
        opened(one, T=T, eos=False),
        opened(one, T=T, field="story"),
        opened((one, 2.0), other, T=T),
    ]
    assert len({digest} | {data.digest for data in changed}) == 1 + len(changed)


def test_notes_name_repeated_sources_and_ids_without_documents(ids, opened):
    data = opened(ids("a.npy", 8), T=T, steps=10, batch_size=4, validation_fraction=0, bos=False)
    (repeated,), (note,) = data.repeated, data.notes
    assert repeated.endswith("a.npy: is read 5.0 times in 10 steps")
    assert note.startswith("warning: ") and "no BOS or EOS among these ids" in note


def test_batches_contain_the_documents_unchanged(opened, write, documents, tokenizer, model):
    data = opened(write("a.jsonl", documents * 3), T=T, validation_fraction=0)
    rows = [row for b in itertools.islice(data.batches(0, 1, [0], 0), data.windows) for row in b.tokens.tolist()]
    (eos,) = model.eos_token_ids
    stream = [i for text in documents * 3 for i in [model.bos_token_id, *tokenizer.encode(text), eos]]
    windows = [stream[i * T : (i + 1) * T + 1] for i in range(data.windows)]
    assert sorted(rows) == sorted(windows) and data.tokens == len(stream)


@pytest.mark.parametrize("length", [2, 9, T, T + 1, 2 * T + 5])
def test_evaluation_data_of_any_length(length, model, tmp_path):
    """A stream shorter than a window is one padded window. A longer one has the windows of training."""
    ids = np.arange(100, 100 + length)
    ids[length // 2] = model.bos_token_id
    np.save(tmp_path / "a.npy", ids)
    (data,) = open_evaluation_data([tmp_path / "a.npy"], TrainConfig(), model, None, "", T, tmp_path)
    (windows,) = data.held_out
    used = min(length, (length - 1) // T * T + 1 if length > T else length)
    assert data.validation_windows == max(1, (length - 1) // T)
    (batch,) = data.validation(4, range(4), 1)
    tokens, segments = batch.tokens[: len(windows)], batch.segments[: len(windows)]
    assert (batch.tokens[len(windows) :] == -1).all()
    is_target = (tokens[:, 1:] >= 0) & (segments[:, 1:] == segments[:, :-1])
    expected = [i for at, i in enumerate(ids[:used]) if at and i != model.bos_token_id]
    assert tokens[:, 1:][is_target].tolist() == windows.targets().tolist() == expected


def test_evaluation_data_is_limited_to_the_first_windows(ids, model, tmp_path):
    (data,) = open_evaluation_data([ids("a.npy", 20)], TrainConfig(), model, None, "", T, tmp_path, limit=3)
    assert firsts(data.validation(4, range(4), 9), 9) == [[0, 1, 2, -101 // T]]
    assert data.held_out[0].targets().tolist() == list(range(101, 101 + 3 * T))


def test_window_of_short_evaluation_data_shrinks_to_the_longest(ids, model, tmp_path):
    paths = [ids("a.npy", 3), ids("b.npy", 1)]
    for T_max, expected in ((2048, 128), (100, 100), (T, T)):
        data = open_evaluation_data(paths, TrainConfig(), model, None, "", T_max, tmp_path)
        assert [text.T for text in data] == [expected] * 2
        assert [text.validation_windows for text in data] == [max(1, 3 * T // expected), 1]
    assert open_evaluation_data([], TrainConfig(), model, None, "", T, tmp_path) == []
