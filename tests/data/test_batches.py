"""The order of the data: the same however it is read, each window once an epoch, mixed as asked."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tli_jax.data.batches import _Order
from tli_jax.errors import DataError, UsageError

pytest.importorskip("grain", reason="grain is not installed: nothing is read in order without it")
T = 16


@pytest.fixture
def ids(tmp_path):
    """Writes a stream in which every token tells where it stands (no BOS among them)."""

    def write(name, windows, start=100, more=1):
        np.save(tmp_path / name, np.arange(start, start + windows * T + more, dtype=np.uint16))
        return tmp_path / name

    return write


def firsts(batches, steps, start=100):
    """Which windows the rows of the first steps are."""
    return [((batch.tokens[:, 0] - start) // T).tolist() for batch in itertools.islice(batches, steps)]


@pytest.fixture
def data(ids, opened):
    return opened(ids("a.npy", 10), ids("b.npy", 21, start=100), T=T, validation_fraction=0)


def test_a_row_is_a_window_and_one_token_more(data):
    batch = next(data.batches(0, 4, range(4), 0))
    assert batch.tokens.shape == batch.segments.shape == (4, T + 1)
    assert batch.tokens.dtype == batch.segments.dtype == np.int32
    np.testing.assert_array_equal(batch.tokens - batch.tokens[:, :1], np.tile(np.arange(T + 1), (4, 1)))
    assert ((batch.tokens[:, 0] - 100) % T == 0).all()


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[6, 7], [4, 5], [0, 1], [2, 3]], [[5], [0, 2]]])
def test_processes_read_the_rows_of_one_batch(data, parts):
    whole = [batch.tokens for batch in itertools.islice(data.batches(0, 8, range(8), 3), 12)]
    for rows in parts:
        for one, all_rows in zip(data.batches(0, 8, rows, 3), whole, strict=False):
            np.testing.assert_array_equal(one.tokens, all_rows[rows])


def test_going_on_is_not_having_stopped(data):
    whole = firsts(data.batches(0, 4, range(4), 5), 30)
    for start in (1, 7, 25):
        assert firsts(data.batches(start, 4, range(4), 5), 5) == whole[start : start + 5]
    assert len(firsts(data.batches(10**9, 4, range(4), 5), 2)) == 2


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_threads_do_not_change_the_order(data, threads):
    assert firsts(data.batches(2, 4, range(4), 5, threads=threads), 40) == firsts(data.batches(2, 4, range(4), 5), 40)


def test_every_epoch_has_every_window_once_in_another_order(ids, opened):
    data = opened(ids("a.npy", 24), T=T, validation_fraction=0)
    assert (data.windows, data.validation_windows, data.tokens) == (24, 0, 24 * T + 1)
    rows = [window for step in firsts(data.batches(0, 5, range(5), 0), 48) for window in step]
    epochs = [rows[start : start + 24] for start in range(0, 240, 24)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10 and list(range(24)) not in epochs
    assert firsts(data.batches(0, 5, range(5), 1), 48) != firsts(data.batches(0, 5, range(5), 0), 48)


def test_the_order_of_a_seed_stays_what_it_was(ids, opened):
    # A run that goes on with a newer Grain must find its data in the old order; where this fails it does not.
    data = opened(ids("a.npy", 10), T=T, validation_fraction=0)
    assert firsts(data.batches(0, 5, range(5), 0), 2) == [[5, 8, 9, 7, 4], [2, 1, 0, 3, 6]]


def test_sources_of_equal_length_are_not_read_in_one_order(ids, opened):
    data = opened(ids("a.npy", 20), ids("b.npy", 20, start=500), T=T, validation_fraction=0)
    tokens = np.concatenate([batch.tokens[:, 0] for batch in itertools.islice(data.batches(0, 4, range(4), 0), 10)])
    one, other = tokens[tokens < 500] - 100, tokens[tokens >= 500] - 500
    assert len(one) == len(other) == 20 and (one != other).any()


def test_weights_hold_and_each_source_wraps_by_itself(ids, opened):
    data = opened((ids("a.npy", 5), 0.7), (ids("b.npy", 9, start=500), 0.3), T=T, validation_fraction=0)
    tokens = np.concatenate([batch.tokens[:, 0] for batch in itertools.islice(data.batches(0, 10, range(10), 0), 90)])
    one, other = tokens[tokens < 500], tokens[tokens >= 500]
    assert (len(one), len(other)) == (630, 270)
    assert set(Counter(one.tolist()).values()) == {126} and set(Counter(other.tolist()).values()) == {30}


@given(st.lists(st.fractions(min_value="1/1000", max_value=1000, max_denominator=1000), min_size=1, max_size=5))
def test_a_mixture_is_never_further_off_than_a_window_a_source(weights):
    order = _Order(weights, 1, (0,))
    seen: Counter[int] = Counter()
    for index in range(100):
        source, before = order[index]
        assert before == seen[source]
        seen[source] += 1
        exact = [Fraction(weight) * (index + 1) / sum(weights) for weight in weights]
        assert all(abs(seen[i] - share) < len(weights) for i, share in enumerate(exact))


def test_segments_of_ids_begin_at_bos(opened, model, tmp_path):
    ids = np.array([5, 6, model.bos_token_id, 7, model.bos_token_id, model.bos_token_id, 8] + [9] * 10)
    np.save(tmp_path / "a.npy", ids)
    for keys, expected in (
        ({}, [0, 0, 1, 1, 2, 3, 3] + [3] * 10),
        ({"isolate": False}, [0, 0, 1, 1, 2, 3, 3] + [3] * 10),  # that is for attention to heed, not for targets
        ({"bos": False}, [0] * 17),
    ):
        batch = next(opened(tmp_path / "a.npy", T=T, **keys).batches(0, 1, [0], 0))
        assert batch.segments.tolist() == [expected]
    # Not over the first: what reads ahead still has that mapped, and a mapped file that gets shorter ends the process.
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


def test_segments_of_a_window_do_not_depend_on_where_it_starts(opened, write):
    data = opened(write("a.jsonl", [f"Document {i} of many." for i in range(60)]), T=T, validation_fraction=0)
    ((windows, _),) = data.training
    whole = np.zeros(len(windows.stream.ids), int)
    whole[windows.stream.starts[1:]] = 1
    whole = np.cumsum(whole)
    for i in range(len(windows)):
        expected = whole[i * T : (i + 1) * T + 1]
        np.testing.assert_array_equal(windows[i][1], expected - expected[0])


def test_segments_end_at_eos_where_there_is_no_bos(opened, tmp_path):
    np.save(tmp_path / "a.npy", np.array([5, 3, 6, 3, 3, 8] + [9] * 10 + [3]))
    batch = next(opened(tmp_path / "a.npy", T=T, bos=False, eos=True, eos_ids=(3, 4)).batches(0, 1, [0], 0))
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2] + [3] * 12]


def test_what_is_kept_out_is_the_end_and_is_not_trained_on(ids, opened):
    data = opened(ids("a.npy", 20), ids("b.npy", 3, start=500), T=T, validation_fraction=0.1)
    assert (data.windows, data.validation_windows) == (18 + 2, 2 + 1)
    trained = {int(i) for b in itertools.islice(data.batches(0, 4, range(4), 0), 40) for i in b.tokens[:, 0]}
    held = [int(i) for batch in data.validation(2, range(2), 9) for i in batch.tokens[:, 0]]
    assert held == [100 + 18 * T, 100 + 19 * T, 500 + 2 * T, -1]
    assert trained == {100 + i * T for i in range(18)} | {500, 500 + T}


def test_a_validation_batch_is_filled_up_and_split_like_any(ids, opened):
    data = opened(ids("a.npy", 20), T=T, validation_text=[ids("b.npy", 5, start=500)])
    assert (data.windows, data.validation_windows) == (20, 5)
    whole = list(data.validation(4, range(4), 10))
    assert [batch.tokens.shape for batch in whole] == [(4, T + 1)] * 2
    assert (whole[1].tokens[1:] == -1).all() and whole[1].tokens[0, 0] == 500 + 4 * T
    for rows in ([0, 1], [3, 2]):
        for one, all_rows in zip(data.validation(4, rows, 10), whole, strict=True):
            np.testing.assert_array_equal(one.tokens, all_rows.tokens[rows])
    assert firsts(data.validation(2, range(2), 1), 9, start=500) == [[0, 2]]
    assert list(opened(ids("a.npy", 20), T=T, validation_fraction=0).validation(4, range(4), 3)) == []


def test_too_few_tokens_are_counted(ids, opened):
    with pytest.raises(DataError, match=r"a\.npy: 16 tokens, one window takes 17"):
        opened(ids("a.npy", 1, more=0), T=T)
    data = opened(ids("a.npy", 3), T=T)
    with pytest.raises(DataError, match=r"49 tokens, 2 windows to train on; one batch takes 3 × 16 \+ 1 tokens"):
        data.batches(0, 3, [0], 0)
    assert len(next(data.batches(0, 2, [0], 0)).tokens) == 1


def test_wrong_wishes_are_usage_errors(ids, opened):
    with pytest.raises(UsageError, match="text is not set"):
        opened(T=T)


def test_the_digest_tells_what_content_and_order_depend_on(ids, opened):
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


def test_notes_say_what_is_repeated_and_what_is_one_document(ids, opened):
    data = opened(ids("a.npy", 8), T=T, steps=10, batch_size=4, validation_fraction=0, bos=False)
    (repeated,), (note,) = data.repeated, data.notes
    assert repeated.endswith("a.npy: is read 5.0 times in 10 steps")
    assert note.startswith("warning: ") and "have no BOS or EOS" in note


def test_texts_come_back_as_they_were(opened, write, documents, tokenizer, model):
    data = opened(write("a.jsonl", documents * 3), T=T, validation_fraction=0)
    rows = [row for b in itertools.islice(data.batches(0, 1, [0], 0), data.windows) for row in b.tokens.tolist()]
    (eos,) = model.eos_token_ids
    stream = [i for text in documents * 3 for i in [model.bos_token_id, *tokenizer.encode(text), eos]]
    windows = [stream[i * T : (i + 1) * T + 1] for i in range(data.windows)]
    assert sorted(rows) == sorted(windows) and data.tokens == len(stream)
