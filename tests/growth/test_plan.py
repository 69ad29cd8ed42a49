"""The plan as data: guarantee, validation, JSON, and repeated growth."""

import dataclasses
import json
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tli_jax.errors import DataError, UsageError
from tli_jax.growth.custom import custom
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
    moe,
    opt_deus,
    slayer,
    stack,
    tli,
)
from tli_jax.growth.plan import Plan
from tli_jax.growth.rows import COMPUTED_INITS, HOST_INITS, INITS, Row

LINEAR = [init for init in INITS if init not in COMPUTED_INITS]


@st.composite
def plans(draw: st.DrawFn, layers: int | None = None, inits: list[str] | None = None) -> Plan:
    """Any plan of a method."""
    layers = draw(st.integers(1, 9)) if layers is None else layers
    computes = layers > 1 and inits is None
    method = draw(st.sampled_from([name for name in METHODS if computes or name not in ("opt_deus", "lesa")]))
    every = draw(st.integers(1, layers))
    if method == "tli":
        # The last layer has no second neighbour.
        possible = [init for init in inits or INITS if layers % every or init not in HOST_INITS]
        init = draw(st.sampled_from(possible))
        scale = 0.25 if init == "scaled" else draw(st.sampled_from([None, 0.0])) if init in COMPUTED_INITS else None
        return tli(layers, every, init, copies=draw(st.integers(1, 2)), scale=scale)
    if method == "custom":
        items = st.tuples(st.integers(0, layers - 1), st.sampled_from(["", "*0", "*0.5", "i", "k", "*0i", "*0k"]))
        return custom(
            layers, ",".join(f"{layer}{tail}" for layer, tail in draw(st.lists(items, min_size=1, max_size=9)))
        )
    after = draw(st.lists(st.integers(0, layers - 1), min_size=1, max_size=3, unique=True))
    make: dict[str, Callable[[], Plan]] = {
        "dus": lambda: dus(layers, every - 1),
        "llama_pro": lambda: llama_pro(layers, after=after),
        "stack": lambda: stack(layers, 2),
        "interpose": lambda: interpose(layers, after=after),
        "slayer": lambda: slayer(layers, after=after),
        "average": lambda: average(layers, after=after),
        "opt_deus": lambda: opt_deus(layers),
        "lesa": lambda: lesa(layers),
        "moe": lambda: moe(layers),
        "midas": lambda: midas(layers, every),
        "lidas": lambda: lidas(layers, every),
        "adept": lambda: adept(layers, every, importance=[float(layer % 3) for layer in range(layers)]),
    }
    return make[method]()


def describe(row: Row) -> tuple[dict[int, float], float]:
    return dict(row.sources), row.scale


@given(plan=plans())
def test_exactness_by_the_effect_of_layers(plan: Plan):
    # A layer with residual outputs 0 is the identity. Without those layers, the base must remain.
    active = [row for row in plan.rows if row.scale != 0]
    is_base = [describe(row) for row in active] == [({layer: 1.0}, 1.0) for layer in range(plan.base_layers)]
    assert plan.is_exact == (is_base and all(row.init not in ("noise", "random") for row in active))
    assert plan.guarantee == ("bit" if plan.is_exact else "none")


@given(plan=plans(inits=["identity", "average_identity", "copy", "half", "noise"]))
def test_marks(plan: Plan):
    if plan.method == "custom":  # has explicit marks
        return
    kept = [row.sources[0][0] for row in plan.rows if not row.injected]
    assert len(kept) == len(set(kept))
    assert all(len(row.sources) == 1 for row in plan.rows if not row.injected)
    assert plan.injected == tuple(row.generation == 1 for row in plan.rows)
    assert plan.generation == 1


@given(plan=plans())
def test_json_round_trip(plan: Plan):
    record = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(record) == plan
    assert Plan.from_json(record).to_json() == plan.to_json()
    # Other keys of growth.json are ignored.
    assert Plan.from_json(record | {"digests": {}, "proof": {"kl": 0.0}, "versions": {}}) == plan


@given(data=st.data(), first=plans())
def test_json_round_trip_of_a_second_growth(data: st.DataObject, first: Plan):
    second = data.draw(plans(layers=len(first))).continues(first)
    third = data.draw(plans(layers=len(second))).continues(second)
    assert Plan.from_json(json.loads(json.dumps(third.to_json()))) == third
    assert [step["method"] for step in third.history] == [first.method, second.method]
    assert Plan.from_json({**third.history[0], "history": []}) == first
    assert third.generation == 3


def test_keys_of_the_record():
    record = tli(4, 2).to_json()
    assert record["version"] == 1
    assert record["base"] == {"layers": 4}
    assert record["rows"][2] == {
        "sources": [[1, 1.0]],
        "scale": 0.0,
        "init": "identity",
        "injected": True,
        "generation": 1,
    }
    assert record["layer_map"] == [[0], [1], [1], [2], [3], [3]]
    assert record["injected"] == record["trainable"] == [False, False, True, False, False, True]
    assert (record["guarantee"], record["experts"], record["history"]) == ("bit", None, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 is not 1"),
        ({"version": None}, "version None is not 1"),
        ({"rows": None}, "TypeError"),
        ({"rows": [{}]}, "KeyError: 'sources'"),
        (
            {"rows": [{"sources": [[0, "x"]], "scale": 1, "init": "copy", "injected": True, "generation": 1}]},
            "'x', must be a number",
        ),
        (
            {"rows": [{"sources": [[7, 1]], "scale": 1, "init": "copy", "injected": True, "generation": 1}]},
            "is built from layer 7",
        ),
        ({"rows": []}, "has no layers"),
        ({"base": "meta-llama"}, "TypeError"),
        ({"layer_map": 3}, "TypeError"),
        ({"history": None}, "TypeError"),
        ({"options": [1]}, "must be an object"),
    ],
)
def test_a_damaged_record_is_refused(change: dict, message: str):
    record = json.loads(json.dumps(tli(4, 2).to_json())) | change
    with pytest.raises(DataError, match=rf"^here/growth.json: .*{re.escape(message)}"):
        Plan.from_json(record, "here/growth.json")


@pytest.mark.parametrize("key", ["method", "base", "rows", "options", "layer_map", "history"])
def test_a_record_without_a_key_is_refused(key: str):
    record = tli(4, 2).to_json()
    del record[key]
    with pytest.raises(DataError, match=f"KeyError: '{key}'"):
        Plan.from_json(record)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "the plan has no layers"),
        ((Row(((3, 1.0),)),), "layer 0 is built from layer 3"),
        ((Row(((0, 1.0),)), Row(((-1, 1.0),))), "layer 1 is built from layer -1"),
        ((Row(((0, float("nan")),)),), "a weight of nan"),
        ((Row(((0, 1.0),), float("-inf")),), "a scale of -inf"),
        ((Row(()),), "no source"),
    ],
)
def test_invalid_rows_are_refused(rows: tuple[Row, ...], message: str):
    with pytest.raises(UsageError, match=re.escape(message)):
        Plan("explicit", 3, rows)


def test_growing_a_grown_model_keeps_one_map_to_the_first_base():
    first = tli(4, 2)  # 0 1 [1] 2 3 [3]
    second = dus(6, 2).continues(first)  # 0 1 [1] 2 | [1] [2] 3 [3]: of the second base 0 1 2 3 2 3 4 5
    assert second.layer_map == ((0,), (1,), (1,), (2,), (1,), (2,), (3,), (3,))
    assert second.injected == (False, False, False, False, True, True, False, False)
    assert [row.generation for row in second.rows] == [0, 0, 1, 0, 2, 2, 0, 1]
    assert second.base_layers == 6
    assert [row.sources[0][0] for row in second.rows] == [0, 1, 2, 3, 2, 3, 4, 5]
    third = tli(8, 8, "average", after=[3]).continues(second)
    assert third.layer_map[4] == (2, 1)
    assert [row.generation for row in third.rows] == [0, 0, 1, 0, 3, 2, 2, 0, 1]
    assert [step["method"] for step in third.history] == ["tli", "dus"]


def test_growing_by_tli_twice():
    second = tli(8, 2).continues(tli(4, 1))
    assert second.layer_map == tuple((layer,) for layer in (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3))
    assert [row.generation for row in second.rows] == [0, 1, 2] * 4
    assert list(second.injected) == [False, False, True] * 4
    assert second.is_exact and second.compose(tli(4, 1)).is_exact


@given(data=st.data(), first=plans())
def test_the_map_of_a_second_growth(data: st.DataObject, first: Plan):
    alone = data.draw(plans(layers=len(first)))
    second = alone.continues(first)
    assert [dataclasses.replace(row, generation=0) for row in second.rows] == [
        dataclasses.replace(row, generation=0) for row in alone.rows
    ]
    for row, origins in zip(second.rows, second.layer_map, strict=True):
        assert set(origins) == {origin for layer, _ in row.sources for origin in first.layer_map[layer]}
        assert all(0 <= origin < first.base_layers for origin in origins)
        assert row.generation == 2 if row.injected else row.generation in (0, 1)


@given(data=st.data(), first=plans(inits=LINEAR))
def test_composition_is_matrix_product(data: st.DataObject, first: Plan):
    """With rows as matrices over layers, for residual outputs and for other tensors, composing multiplies them."""
    second = data.draw(plans(layers=len(first), inits=LINEAR))
    parents = [{first.rows[layer].scale for layer, _ in row.sources} for row in second.rows]
    if any(len(scales) > 1 for scales in parents):
        with pytest.raises(UsageError, match="cannot be written as one step"):
            second.compose(first)
        return
    both = second.compose(first)

    def matrix(plan: Plan, is_output: bool) -> list[list[float]]:
        return [
            [row.factor(is_output) * dict(row.sources).get(layer, 0.0) for layer in range(plan.base_layers)]
            for row in plan.rows
        ]

    for is_output in (False, True):
        a, b = matrix(second, is_output), matrix(first, is_output)
        product = [[sum(w * b[k][j] for k, w in enumerate(row)) for j in range(first.base_layers)] for row in a]
        assert matrix(both, is_output) == product
    assert both.base_layers == first.base_layers
    continued = second.continues(first)
    assert (both.layer_map, both.injected) == (continued.layer_map, continued.injected)
    assert [row.generation for row in both.rows] == [row.generation for row in continued.rows]
    if first.is_exact and second.is_exact:
        assert both.is_exact


@pytest.mark.parametrize(
    ("second", "first"),
    [
        (tli(6, 2, "noise"), tli(4, 2)),
        (tli(6, 2, "random"), tli(4, 2)),
        (dus(6, 2), tli(4, 2, "noise")),
        (stack(6), tli(4, 2, "random")),
        (average(6, 1), tli(4, 2)),  # means of layers with different scales
    ],
)
def test_compose_refuses_plans_without_a_single_step(second: Plan, first: Plan):
    with pytest.raises(UsageError, match=r"layer \d+ cannot be written as one step from the first base"):
        second.compose(first)
    assert len(second.continues(first)) == len(second)


@pytest.mark.parametrize("method", [Plan.continues, Plan.compose])
def test_depths_that_do_not_fit_are_refused(method: Callable[[Plan, Plan], Plan]):
    with pytest.raises(UsageError, match="dus: made for a base of 5 layers, tli gives 6"):
        method(dus(5), tli(4, 2))


def test_hashing():
    assert hash(tli(8, 4)) == hash(tli(8, 4)) and tli(8, 4) == tli(8, 4)
    assert (
        len({tli(8, 4), tli(8, 4), tli(8, 4, "copy"), tli(8, 2), tli(8, 4, "noise"), tli(8, 4, "noise", seed=1)}) == 5
    )
    assert len({tli(8, 4).continues(tli(6, 3)), tli(8, 4)}) == 2


def test_text():
    text = str(tli(4, 2, "scaled", scale=0.5))
    assert text == "tli: 4 → 6 layers\n0 1 [1·0.5] 2 3 [3·0.5]"
    assert str(tli(4, 4, "noise")).endswith("0 1 2 3 [3~]")
    assert str(slayer(4)).endswith("0 1 [1+2·0] 2 3")
