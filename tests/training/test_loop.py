"""The line of text about a step."""

import pytest

from tli_jax.training.loop import describe_step

METRICS = {"loss": 3.41234, "gradient_norm": 0.713, "skipped": 0, "tokens_per_second": 12345.6, "mfu": None}


@pytest.mark.parametrize(
    ("metrics", "validation_loss", "text"),
    [
        (
            {"learning_rate_kept": 2e-4, "learning_rate_injected": 2e-4},
            None,
            "loss 3.4123 · learning rate 2.00e-04 · gradient norm 0.71 · 12,346 tokens/s",
        ),
        (
            {"learning_rate_kept": 1e-5, "learning_rate_injected": 2e-4, "mfu": 0.4123, "skipped": 2},
            3.5,
            "loss 3.4123 · validation loss 3.5000 · learning rate kept 1.00e-05, injected 2.00e-04"
            " · gradient norm 0.71 · 2 bad steps in a row · 12,346 tokens/s · MFU 41.2%",
        ),
        (
            {"learning_rate_injected": 1e-3, "loss": float("nan"), "gradient_norm": float("inf")},
            float("nan"),
            "loss nan · validation loss nan · learning rate 1.00e-03 · gradient norm inf · 12,346 tokens/s",
        ),
    ],
)
def test_description_of_a_step(metrics, validation_loss, text):
    assert describe_step(METRICS | metrics, validation_loss) == text
