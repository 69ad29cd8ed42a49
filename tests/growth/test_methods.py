"""Every method against its definition: order of layers, marks, scales, guarantee, errors."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tli_jax.errors import UsageError
from tli_jax.growth.custom import custom
from tli_jax.growth.experts import Experts
from tli_jax.growth.methods import (
    METHODS,
    adept,
    average,
    dus,
    interpose,
    lesa,
    lidas,
    llama_pro,
    midas,
    opt_deus,
    slayer,
    stack,
    tli,
)
from tli_jax.growth.plan import Plan, draw_layer_map
from tli_jax.growth.rows import HOST_INITS, INITS, Row

# Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B: number of layers, parameters per layer, parameters outside the layers.
SHAPES = {16: (60.8e6, 262.7e6), 28: (100.7e6, 394.0e6), 32: (218.1e6, 1050.7e6)}
DEPTHS = st.integers(1, 40)


def notation(plan: Plan) -> str:
    """A plan in short: ``3``, ``3*0.5``, means as ``3+4``, injected layers in brackets.

    Independent of ``draw_layer_map``, so that a bug there does not hide one in a method.
    """
    cells = []
    for row in plan.rows:
        weights = {weight for _, weight in row.sources}
        assert weights == ({1.0} if len(row.sources) == 1 else {0.5})
        text = "+".join(str(layer) for layer, _ in row.sources) + ("" if row.scale == 1 else f"*{row.scale:g}")
        assert row.injected == (row.init != "keep") == (row.generation == 1)
        cells.append(f"[{text}]" if row.injected else text)
    return " ".join(cells)


def numbers(first: int, last: int) -> str:
    return " ".join(map(str, range(first, last + 1)))


def test_the_list_of_methods_and_initialisers():
    assert set(METHODS) == {
        *("tli", "dus", "llama_pro", "slayer", "average", "stack", "interpose"),
        *("opt_deus", "lesa", "midas", "lidas", "adept", "moe", "custom"),
    }
    assert set(INITS) == {
        *("copy", "identity", "scaled", "half", "average", "average_identity", "next_identity"),
        *("noise", "random", "transport", "predictor"),
    }
    needed = {"llama_pro": {"groups": 4}, "custom": {"spec": "0-7"}, "adept": {"importance": [0.0] * 8}}
    for name, preset in METHODS.items():
        assert preset(8, **needed.get(name, {})).method == name


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (tli(5, 1), "0 [0*0] 1 [1*0] 2 [2*0] 3 [3*0] 4 [4*0]"),
        (tli(5, 2), "0 1 [1*0] 2 3 [3*0] 4"),
        (tli(5, 5), "0 1 2 3 4 [4*0]"),
        (tli(4, 2, copies=2), "0 1 [1*0] [1*0] 2 3 [3*0] [3*0]"),
        (tli(5, 2, "copy"), "0 1 [1] 2 3 [3] 4"),
        (tli(5, 2, "scaled", scale=0.3), "0 1 [1*0.3] 2 3 [3*0.3] 4"),
        (tli(5, 2, "half"), "0 1*0.5 [1*0.5] 2 3*0.5 [3*0.5] 4"),
        (tli(5, 2, "average"), "0 1 [1+2] 2 3 [3+4] 4"),
        (tli(5, 2, "average_identity"), "0 1 [1+2*0] 2 3 [3+4*0] 4"),
        (tli(4, 2, "average"), "0 1 [1+2] 2 3 [3]"),
        (tli(5, 2, "next_identity"), "0 1 [2*0] 2 3 [4*0] 4"),
        (tli(4, 2, "next_identity"), "0 1 [2*0] 2 3 [3*0]"),
        (tli(5, 2, "noise"), "0 1 [1] 2 3 [3] 4"),
        (tli(5, 2, "random", scale=0.0), "0 1 [1*0] 2 3 [3*0] 4"),
        (tli(5, init="copy", after=[4, 0]), "0 [0] 1 2 3 4 [4]"),
        (dus(5, 1), "0 1 2 3 [1] [2] [3] 4"),
        (dus(32, 8), f"{numbers(0, 23)} {' '.join(f'[{i}]' for i in range(8, 24))} {numbers(24, 31)}"),
        (dus(4, 0), "0 1 2 3 [0] [1] [2] [3]"),
        (dus(4, 2), "0 1 2 3"),
        (dus(4, 3), "0 3"),
        (dus(4), "0 1 2 [1] [2] 3"),
        (llama_pro(4), "0 1 2 3 [3*0]"),
        (llama_pro(6), "0 1 2 3 4 5 [5*0]"),
        (llama_pro(10), "0 1 2 3 4 [4*0] 5 6 7 8 9 [9*0]"),
        (llama_pro(4, 2), "0 1 [1*0] 2 3 [3*0]"),
        (llama_pro(4, 2, 2), "0 1 [1*0] [1*0] 2 3 [3*0] [3*0]"),
        (llama_pro(4, 4), "0 [0*0] 1 [1*0] 2 [2*0] 3 [3*0]"),
        (llama_pro(4, after=[2]), "0 1 2 [2*0] 3"),
        (slayer(5), "0 1 [1+2*0] 2 3 4"),
        (slayer(8), "0 1 [1+2*0] 2 3 [3+4*0] 4 5 6 7"),
        (slayer(5, after=[0, 3]), "0 [0+1*0] 1 2 3 [3+4*0] 4"),
        (average(5, 2), "0 1 [1+2] 2 3 [3+4] 4"),
        (average(4), "0 1 2 3 [3]"),
        (average(5, after=[0]), "0 [0+1] 1 2 3 4"),
        (opt_deus(5), "0 1 [1+2*0] 2 [2+3*0] 3 [3+4*0] 4"),
        (opt_deus(2), "0 [0+1*0] 1"),
        (opt_deus(4, after=[0]), "0 [0+1*0] 1 2 3"),
        (lesa(5), "0 1 [1+2] 2 [2+3] 3 [3+4] 4"),
        (tli(5, 2, "transport"), "0 1 [1+2*0] 2 3 [3+4*0] 4"),
        (tli(5, 2, "transport", scale=1.0), "0 1 [1+2] 2 3 [3+4] 4"),
        (tli(5, 2, "predictor", scale=0.5), "0 1 [1+2*0.5] 2 3 [3+4*0.5] 4"),
        (midas(8), "0 1 2 3 [2] [3] 4 5 6 7"),
        (midas(12), "0 1 2 3 4 5 [3] [4] [5] 6 7 8 9 10 11"),
        (midas(9, 3), "0 1 2 3 4 5 [3] [4] [5] 6 7 8"),
        (midas(5), "0 1 2 3 [2] [3] 4"),
        (midas(3, 3), "0 1 2 [0] [1] [2]"),
        (lidas(8, 4), "0 1 2 3 4 5 [2] [3] [4] [5] 6 7"),
        (lidas(12), "0 1 2 3 4 5 6 [4] [5] [6] 7 8 9 10 11"),
        (lidas(5, 1), "0 1 2 [2] 3 4"),
        (adept(5, 2, importance=[5, 1, 3, 1, 2]), "0 1 [1*0] 2 3 [3*0] 4"),
        (adept(5, importance=[1, 1, 0, 4, 4]), "0 [0*0] 1 2 [2*0] 3 4"),
        (adept(5, after=[4]), "0 1 2 3 4 [4*0]"),
        (stack(3), "0 1 2 [0] [1] [2]"),
        (stack(2, 3), "0 1 [0] [1] [0] [1]"),
        (stack(2, 1), "0 1"),
        (interpose(3), "0 [0] 1 [1] 2 [2]"),
        (interpose(3, after=[1], copies=2), "0 1 [1] [1] 2"),
        (custom(16, "0-3, 3*0, 4-7, 7*0.5, 8-15"), f"{numbers(0, 3)} [3*0] {numbers(4, 7)} [7*0.5] {numbers(8, 15)}"),
        (custom(4, "3,2 , 1,0"), "3 2 1 0"),
        (custom(4, "0-1*0.5, 2*.25, 3*1e-3"), "0*0.5 1*0.5 2*0.25 3*0.001"),
        (custom(4, "0-3, 2-3k, 0i, 1*0i"), "0 1 2 3 2 3 [0] [1*0]"),
        (custom(4, "2*0, 0-3"), "[2*0] 0 1 2 3"),
    ],
    ids=lambda value: value.method if isinstance(value, Plan) else "",
)
def test_order_marks_and_scales(plan: Plan, expected: str):
    assert notation(plan) == expected


@pytest.mark.parametrize(
    ("plan", "depth", "injected_at"),
    [
        (llama_pro(32, 8), 40, range(4, 40, 5)),
        (llama_pro(32), 40, range(4, 40, 5)),
        (slayer(32), 40, range(2, 24, 3)),
        (dus(32, 8), 48, range(24, 40)),
        (dus(80, 20), 120, range(60, 100)),
        (tli(126, 2), 189, range(2, 189, 3)),
        (opt_deus(32), 48, range(16, 48, 2)),
        (lesa(32), 48, range(16, 48, 2)),
    ],
)
def test_published_sizes(plan: Plan, depth: int, injected_at: range):
    assert len(plan) == depth
    assert [number for number, mark in enumerate(plan.injected) if mark] == list(injected_at)


@pytest.mark.parametrize(
    ("layers", "every", "depth", "billions"),
    [
        (16, 8, 18, 1.36),
        (16, 4, 20, 1.48),
        (16, 2, 24, 1.72),
        (28, 8, 31, 3.51),
        (28, 4, 35, 3.92),
        (28, 2, 42, 4.62),
        (32, 8, 36, 8.90),
        (32, 4, 40, 9.78),
        (32, 2, 48, 11.52),
    ],
)
def test_sizes_of_grown_llamas(layers: int, every: int, depth: int, billions: float):
    plan = tli(layers, every)
    per_layer, outside = SHAPES[layers]
    assert len(plan) == depth
    assert round((outside + len(plan) * per_layer) / 1e9, 2) == pytest.approx(billions, abs=0.011)
    # TLI and DUS at equal size: the same number of layers, kept and injected.
    if every == 2:
        other = dus(layers, layers // 4)
        assert (len(other), sum(other.injected)) == (len(plan), sum(plan.injected))


@pytest.mark.parametrize(
    ("plan", "is_exact"),
    [
        (tli(6, 2, "copy"), False),
        (tli(6, 2, "identity"), True),
        (tli(6, 2, "scaled", scale=0.3), False),
        (tli(6, 2, "scaled", scale=0.0), True),
        (tli(6, 2, "scaled", scale=1.0), False),
        (tli(6, 2, "half"), False),
        (tli(6, 2, "average"), False),
        (tli(6, 2, "average_identity"), True),
        (tli(6, 2, "next_identity"), True),
        (tli(6, 2, "noise"), False),
        (tli(6, 2, "noise", scale=0.0), True),
        (tli(6, 2, "random"), False),
        (tli(6, 2, "random", scale=0.0), True),
        (tli(5, 3, "random", after=[1], scale=0.0), True),
        (dus(6, 1), False),
        (dus(6, 3), True),  # the base itself
        (dus(6, 5), False),
        (llama_pro(6, 3), True),
        (slayer(6), True),
        (average(6, 2), False),
        (stack(6), False),
        (stack(6, 1), True),
        (interpose(6), False),
        (custom(6, "0-5, 5*0, 3*0"), True),
        (custom(6, "2*0, 0-5"), True),
        (custom(6, "0-4"), False),
        (custom(6, "0-4, 5*0"), False),
        (custom(6, "1, 0, 2-5"), False),
        (custom(6, "0-5*0.5"), False),
    ],
    ids=lambda value: f"{value.method}-{value.options}" if isinstance(value, Plan) else "",
)
def test_exactness(plan: Plan, is_exact: bool):
    assert plan.guarantee == ("bit" if is_exact else "none")
    assert plan.is_exact == is_exact


def test_options_that_the_plan_keeps():
    assert tli(8).options == {"init": "identity", "copies": 1, "every": 4}
    assert tli(8, init="copy", after=[5, 1]).options == {"init": "copy", "copies": 1, "after": [1, 5]}
    noise = tli(8, 8, "noise", seed=7, noise_ratio=0.5, scale=0.0)
    assert noise.options == {"init": "noise", "copies": 1, "every": 8, "scale": 0.0, "seed": 7, "noise_ratio": 0.5}
    assert tli(8, 8, "random", std=0.1).options == {"init": "random", "copies": 1, "every": 8, "seed": 0, "std": 0.1}
    assert dus(8).options == {"drop": 2}
    assert llama_pro(8, 2).options == {"groups": 2, "copies": 1}
    assert stack(8).options == {"times": 2}
    assert custom(8, "0-7").options == {"layers": "0-7"}


def test_notes():
    assert tli(5, 2, "average").notes == ()
    of_two = [tli(4, 2, init) for init in ("average", "average_identity", "next_identity")]
    for plan in (*of_two, average(4), slayer(4, after=[3])):
        assert plan.notes == ("no layer follows layer 3: the layer injected after it is built from it alone",)
    assert custom(6, "0, 2-3, 5").notes == ("base layers 1, 4 are dropped",)
    assert custom(6, "5, 0-4").notes == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tli(5, 0), "every is 0, must be 1…5"),
        (lambda: tli(5, 6), "every is 6, must be 1…5"),
        (lambda: tli(5, -2), "every is -2, must be 1…5"),
        (lambda: tli(5, 2, remainder="error"), "every 2 does not divide 5 layers"),
        (lambda: tli(5, 2, remainder="eror"), "remainder 'eror' is not known, use allow or error"),
        (lambda: tli(5, 2, "idntity"), "init 'idntity' is not known, did you mean identity?"),
        (lambda: tli(5, 2, "scaled"), "scaled requires a scale"),
        (lambda: tli(5, 2, "copy", scale=0.5), "only noise, random, transport, predictor also accept one"),
        (lambda: tli(5, 2, "identity", scale=0.0), "only noise, random, transport, predictor also accept one"),
        (lambda: tli(5, 2, "scaled", scale=float("nan")), "scale of nan"),
        (lambda: tli(5, 2, "scaled", scale=float("inf")), "scale of inf"),
        (lambda: tli(5, 2, copies=0), "copies is 0, must be 1…1000"),
        (lambda: tli(5, after=[5]), "position is 5, must be 0…4"),
        (lambda: tli(5, after=[-1]), "position is -1, must be 0…4"),
        (lambda: tli(5, after=[1, 1]), "each only once"),
        (lambda: tli(5, after=[]), "list at least one position"),
        (lambda: dus(5, 5), "drop is 5, must be 0…4"),
        (lambda: dus(5, -1), "drop is -1, must be 0…4"),
        (lambda: llama_pro(32, 5), "groups is 5, must divide 32 layers: one of 1, 2, 4, 8, 16, 32"),
        (lambda: llama_pro(32, 0), "groups is 0, must divide 32 layers"),
        (lambda: llama_pro(32, 8, 0), "copies is 0, must be 1…1000"),
        (lambda: llama_pro(4, after=[4]), "position is 4, must be 0…3"),
        (lambda: interpose(5, copies=1001), "copies is 1001, must be 1…1000"),
        (lambda: stack(5, 1001), "times is 1001, must be 1…1000"),
        (lambda: stack(5, 0), "times is 0, must be 1…1000"),
        (lambda: interpose(5, after=[9]), "position is 9, must be 0…4"),
        (lambda: interpose(5, copies=0), "copies is 0, must be 1…1000"),
        (lambda: slayer(3), "it needs at least 4"),
        (lambda: slayer(4, after=[4]), "position is 4, must be 0…3"),
        (lambda: average(5, 9), "every is 9, must be 1…5"),
        (lambda: custom(4, ""), "'' is not a layer"),
        (lambda: custom(4, "0-3,"), "'' is not a layer"),
        (lambda: custom(4, "0-4"), "'0-4' is out of range, the base has layers 0-3"),
        (lambda: opt_deus(1), "has 1 layers, at least 2"),
        (lambda: opt_deus(4, after=[3]), "none follows layer 3"),
        (lambda: tli(4, 2, "transport"), "none follows layer 3"),
        (lambda: tli(4, 2, "identity", scale=0.5), "also accept one"),
        (lambda: lesa(4, norms="last"), "norms 'last' is not known"),
        (lambda: lesa(4, epochs=0), "epochs is 0"),
        (lambda: midas(4, 5), "block is 5, must be 1…4"),
        (lambda: lidas(4, 0), "block is 0, must be 1…4"),
        (lambda: adept(4), "needs the importance of 4 layers, has none"),
        (lambda: adept(4, importance=[1.0]), "has 1"),
        (lambda: adept(4, 5, importance=[1.0] * 4), "count is 5"),
        (lambda: custom(4, "2-1"), "'2-1' is out of range"),
        (lambda: custom(4, "-1"), "'-1' is not a layer"),
        (lambda: custom(4, "0*x"), "'0*x' is not a layer"),
        (lambda: custom(4, "0*1e999"), "scale of inf"),
    ],
)
def test_errors(make, message: str):
    with pytest.raises(UsageError, match=re.escape(message)):
        make()


@given(layers=st.integers(3, 40), data=st.data(), init=st.sampled_from(list(INITS)), copies=st.integers(1, 3))
def test_tli_keeps_all_base_layers_in_order(layers: int, data: st.DataObject, init: str, copies: int):
    every = data.draw(st.integers(1, layers).filter(lambda every: layers % every or init not in HOST_INITS))
    plan = tli(layers, every, init, copies=copies, scale=0.7 if init == "scaled" else None)
    assert len(plan) == layers + copies * (layers // every)
    kept = [row for row in plan.rows if not row.injected]
    assert [row.sources for row in kept] == [((layer, 1.0),) for layer in range(layers)]
    scaled = {row.sources[0][0] for row in kept if row.scale != 1}
    assert scaled == (set(range(every - 1, layers, every)) if init == "half" else set())
    assert plan.is_exact == all(row.scale == 0 for row in plan.rows if row.injected)
    # Each injected layer is next to its source.
    before = -1
    for row, sources in zip(plan.rows, plan.layer_map, strict=True):
        if row.injected:
            assert sources[0] == (min(before + 1, layers - 1) if init == "next_identity" else before)
        else:
            before = sources[0]


@given(layers=DEPTHS, data=st.data())
def test_dus_follows_its_formula(layers: int, data: st.DataObject):
    drop = data.draw(st.integers(0, layers - 1))
    plan = dus(layers, drop)
    assert len(plan) == 2 * (layers - drop)
    assert plan.layer_map == tuple((layer,) for layer in [*range(layers - drop), *range(drop, layers)])
    assert sum(plan.injected) == max(0, layers - 2 * drop)
    assert plan.is_exact == (2 * drop == layers)


@given(layers=DEPTHS, data=st.data(), copies=st.integers(1, 3))
def test_llama_pro_follows_its_formula(layers: int, data: st.DataObject, copies: int):
    groups = data.draw(st.sampled_from([n for n in range(1, layers + 1) if layers % n == 0]))
    plan = llama_pro(layers, groups, copies)
    assert len(plan) == layers + groups * copies
    assert plan.is_exact
    size = layers // groups + copies
    assert list(plan.injected) == ([False] * (layers // groups) + [True] * copies) * groups
    assert all(
        plan.rows[number].sources == plan.rows[number - 1].sources for number in range(size - 1, len(plan), size)
    )


@given(layers=DEPTHS, times=st.integers(1, 4))
def test_stack_follows_its_formula(layers: int, times: int):
    plan = stack(layers, times)
    assert plan.layer_map == tuple((layer,) for _ in range(times) for layer in range(layers))
    assert list(plan.injected) == [False] * layers + [True] * layers * (times - 1)


@given(layers=st.integers(4, 80))
def test_slayer_stays_in_the_shallow_half(layers: int):
    plan = slayer(layers)
    positions = [row.sources[0][0] for row in plan.rows if row.injected]
    assert positions == [i for i in range(1, layers, 2) if i <= layers / 2 - 1]
    assert plan.is_exact


@given(layers=DEPTHS, data=st.data())
def test_explicit_positions_equal_those_of_the_rule(layers: int, data: st.DataObject):
    every = data.draw(st.integers(1, layers))
    after = data.draw(st.permutations(range(every - 1, layers, every)))
    assert tli(layers, after=after).rows == tli(layers, every).rows
    assert average(layers, after=after).rows == average(layers, every).rows
    if layers % every == 0:
        assert llama_pro(layers, after=after).rows == llama_pro(layers, layers // every).rows == tli(layers, every).rows
    assert interpose(layers, after=after).rows == tli(layers, every, "copy").rows


@given(plan=st.builds(tli, st.just(30), st.integers(1, 30), st.sampled_from(["identity", "copy", "average", "noise"])))
def test_the_layer_map_has_all_layers_within_its_width(plan: Plan):
    lines = draw_layer_map(plan, width=40).splitlines()
    assert max(map(len, lines)) <= 40
    cells = " ".join(lines).split()
    assert len(cells) == len(plan)
    assert [cell.startswith("[") for cell in cells] == list(plan.injected)


@pytest.mark.parametrize("ratio", [math.nan, math.inf, -1.0, 1e39])
def test_noise_ratios_out_of_range_are_refused(ratio: float):
    with pytest.raises(UsageError, match=r"noise_ratio is .*, must be 0…1000"):
        tli(4, 2, "noise", noise_ratio=ratio)


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (lambda: tli(100, 1, copies=1000), "100,100"),
        (lambda: stack(100, 1000), "100,000"),
        (lambda: interpose(100, copies=1000), "100,100"),
        (lambda: custom(100, ",".join(["0-99"] * 101)), "10,100"),
        (lambda: Plan("explicit", 1, (Row(((0, 1.0),)),) * 10_001), "10,001"),
    ],
)
def test_plans_deeper_than_any_model_are_refused(make, layers: str):
    with pytest.raises(UsageError, match=f"{layers} layers are more than the 10,000 that a plan can have"):
        make()


def test_too_many_experts_are_refused():
    for options in ({"count": 10**9}, {"count": 200, "granularity": 200, "upcycle": "virtual_groups"}):
        with pytest.raises(UsageError, match="more than 10,000 experts"):
            Experts(**options)
    with pytest.raises(UsageError, match="router_std"):
        Experts(router_std=math.inf)
