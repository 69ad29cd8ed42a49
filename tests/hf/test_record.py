"""``growth.json`` of anybody: what a growth writes is read as it is, anything else is damage, never a crash."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tli_jax.errors import DataError
from tli_jax.growth.experts import Experts
from tli_jax.growth.methods import adept, stack
from tli_jax.growth.plan import Plan
from tli_jax.hf.record import read_growth_record

FIRST = adept(4, 2, importance=[0.5, 0.25, 1.0, 0.0])
SECOND = stack(len(FIRST), 2).continues(FIRST)
RECORD: dict[str, Any] = {
    **SECOND.to_json(),
    "base": {"layers": len(FIRST), "name": "a/b", "revision": None},
    "experts": Experts(4, 2).to_json(),
    "parameters": 1000,
    "digests": {"algorithm": "sha256", "base": {"a": "00"}, "grown": {"a": "01"}},
    "nonfinite": {"a": 3},
    "computed": {},
    "versions": {"python": "3.11"},
    "proof": {
        "tokens": 128,
        "text": "the embedded text",
        "dtype": "float32",
        "device": "cpu",
        "max_abs_logit": 1.5,
        "max_abs_logit_difference": 0.0,
        "kl": 0.0,
        "loss_base": 2.0,
        "loss_grown": 2.0,
        "top1": 1.0,
        "parted_at": None,
        "changes": [{"layer": 2, "relative_change": 0.0, "cosine": 1.0}],
        "seconds": 0.5,
    },
}
NONSENSE = [None, True, -1, 1.5, 10**30, "", "x", "\ud800", [], [[0]], [None], {}, {"a": [1]}]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to everything in JSON data."""
    found = [path] if path else []
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(child, (*path, key))
    return found


def put(record: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(record)
    *way, last = path
    at = changed
    for key in way:
        at = at[key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return changed


def read(folder: Path, record: Any) -> dict[str, Any]:
    file = folder / "growth.json"
    file.write_text(record if isinstance(record, str) else json.dumps(record))
    return read_growth_record(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("record")


def test_what_a_growth_writes_is_read_as_it_is(folder: Path):
    assert read(folder, RECORD) == RECORD
    assert Plan.from_json(RECORD).history == SECOND.history
    # Less was known to those who saved by hand, and a proof of what is not finite has null in it.
    assert read(folder, SECOND.to_json())["proof"] is None
    assert read(folder, put(RECORD, ("proof", "loss_base"), None))["proof"]["loss_base"] is None


@given(path=st.sampled_from(places(RECORD)), value=st.sampled_from([..., *NONSENSE]))
@settings(max_examples=600)
def test_nonsense_anywhere_is_damage_or_makes_no_difference_to_the_types(
    folder: Path, path: tuple[Any, ...], value: Any
):
    refused = ""
    try:
        found = read(folder, put(RECORD, path, value))
    except DataError as error:
        found, refused = None, str(error)
    if found is None:
        assert refused.startswith(str(folder / "growth.json")) and len(refused) < 500 and "\n" not in refused
        return
    plan = Plan.from_json(found)
    # All that is done with it: as text, as a base for the next growth, in reports.
    assert str(plan) and hash(plan) and stack(len(plan), 2).continues(plan).generation == plan.generation + 1
    assert all(layer < 4 for layers in plan.layer_map for layer in layers)
    if found["proof"] is not None:
        assert all(isinstance(found["proof"][key], float | int | None) for key in ("kl", "loss_base", "top1"))
    assert isinstance(found.get("parameters", 0), int) and isinstance(found["base"].get("name"), str | None)


DAMAGED = {
    "an infinite weight": (("rows", 0, "sources", 0, 1), float("inf"), "not finite"),
    "a weight that is no number": (("rows", 0, "sources", 0, 1), float("nan"), "not finite"),
    "an infinite layer": (("rows", 0, "sources", 0, 0), float("inf"), "not finite"),
    "a layer that is a fraction": (("rows", 0, "sources", 0, 0), 0.5, "0 is 0.5, must be a whole number"),
    "a map in a map": (("layer_map", 0), [[0]], "[0], must be a whole number"),
    "a map beyond the first base": (("layer_map", 0), [4], "[4], must be layers of the first base"),
    "a growth to come": (("rows", 0, "generation"), 3, "generation is 3, must be 0…2"),
    "a generation without end": (("rows", 0, "generation"), 10**30, "must be a whole number"),
    "yes for a number": (("rows", 0, "scale"), True, "scale is True, must be a number"),
    "an init nobody has": (("rows", 0, "init"), "magic", "init 'magic' is not known"),
    "an importance of words": (("history", 0, "options", "importance"), ["a"], "must be a number"),
    "experts of words": (("experts", "count"), "8", "experts: count is '8'"),
    "experts with an option": (("experts", "more"), 1, "more"),
    "a proof that is a number": (("proof",), 1.0, "proof is 1.0"),
    "a proof that lacks a loss": (("proof", "loss_base"), ..., "proof is {"),
    "parameters in words": (("parameters",), "many", "parameters is 'many'"),
    "digests of numbers": (("digests", "grown"), {"a": 1}, "digests is {"),
    "a base whose name is a number": (("base", "name"), 3, "base.name is 3"),
    "a version that is true": (("version",), True, "version True is not 1"),
    "a history of words": (("history", 0), "x", "must be an object"),
    "too many layers": (("base", "layers"), 10**9, "more than the 10,000"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case: str, folder: Path):
    path, value, said = DAMAGED[case]
    with pytest.raises(DataError) as refusal:
        read(folder, put(RECORD, path, value))
    assert said in str(refusal.value), str(refusal.value)
