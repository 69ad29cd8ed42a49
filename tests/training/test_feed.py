"""Sums over a validation are exact at real sizes, and a loss is finite."""

import numpy as np
import pytest

from tli_jax.errors import DataError
from tli_jax.training.feed import Measured


def test_sums_neither_overflow_nor_drift():
    parts = [(np.float32(2**24), np.int32(2**30))] + [(np.float32(1), np.int32(2**30))] * 1000
    assert Measured.total(parts) == (2**24 + 1000, 1001 * 2**30)


def test_a_loss_is_finite_or_an_error():
    assert Measured(3.0, 2).loss == 1.5 and Measured(0.0, 0).loss is None
    for nats in (float("nan"), float("inf")):
        with pytest.raises(DataError, match="the weights contain NaN or Inf"):
            _ = Measured(nats, 2).loss
