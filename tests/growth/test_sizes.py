"""Methods at the size of tli with the same K, or the next smaller one."""

import pytest

from tli_jax.growth.methods import METHODS
from tli_jax.growth.plan import Plan
from tli_jax.growth.sizes import fit

DEPTH = sorted(METHODS.keys() - {"custom", "moe"})


def grow(method: str, layers: int, every: int) -> Plan | None:
    options = fit(method, layers, every, {})
    if options is None:
        return None
    importance = {"importance": [float(i) for i in range(layers)]} if method == "adept" else {}
    return METHODS[method](layers, **options, **importance)


@pytest.mark.parametrize("method", DEPTH)
@pytest.mark.parametrize("layers", [5, 12, 16, 28, 32, 80, 126])
@pytest.mark.parametrize("every", [1, 2, 3, 4, 8])
def test_never_larger_than_tli(method: str, layers: int, every: int) -> None:
    plan, size = grow(method, layers, every), layers + layers // every
    if layers < every:
        assert plan is None
    elif plan is not None:
        assert layers < len(plan) <= size
        if method in ("tli", "average", "interpose", "llama_pro", "midas", "lidas", "adept"):
            assert len(plan) == size
        if method == "dus":
            assert len(plan) == size - size % 2
    else:
        assert (method == "stack" and every > 1) or (method == "dus" and layers // every == 1)


# Published settings at that size.
@pytest.mark.parametrize(
    ("method", "layers", "every", "options"),
    [
        ("dus", 32, 2, {"drop": 8}),  # SOLAR
        ("llama_pro", 32, 4, {"groups": 8, "copies": 1}),
        ("slayer", 32, 4, {"after": [1, 3, 5, 7, 9, 11, 13, 15]}),
        ("opt_deus", 32, 2, {"after": list(range(15, 31))}),
        ("lesa", 32, 2, {"after": list(range(15, 31))}),
        ("midas", 32, 4, {"block": 8}),
        ("stack", 12, 1, {"times": 2}),
    ],
)
def test_as_published(method: str, layers: int, every: int, options: dict) -> None:
    assert fit(method, layers, every, {}) == options


def test_given_options_are_kept() -> None:
    assert fit("dus", 12, 2, {"drop": 1}) == {}
    assert fit("tli", 12, 2, {"after": [1]}) == {}
    assert fit("tli", 12, 2, {"init": "copy"}) == {"every": 2}
    assert fit("llama_pro", 12, 2, {}) == {"groups": 6, "copies": 1}
    assert fit("llama_pro", 28, 8, {}) == {"groups": 1, "copies": 3}
