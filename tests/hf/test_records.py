"""``growth.json`` from anyone: a valid record is read unchanged, anything else is reported as damage, never a crash."""

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
from tli_jax.hf.records import read_growth

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


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value in JSON data."""
    found = [path] if path else []
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += paths(child, (*path, key))
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
    return read_growth(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("record")


def test_valid_record_is_read_unchanged(folder: Path):
    assert read(folder, RECORD) == RECORD
    assert Plan.from_json(RECORD).history == SECOND.history
    # save_hf writes fewer keys, and a proof has null for values that are not finite.
    assert read(folder, SECOND.to_json())["proof"] is None
    assert read(folder, put(RECORD, ("proof", "loss_base"), None))["proof"]["loss_base"] is None


@given(path=st.sampled_from(paths(RECORD)), value=st.sampled_from([..., *NONSENSE]))
@settings(max_examples=600)
def test_nonsense_anywhere_is_reported_or_harmless(folder: Path, path: tuple[Any, ...], value: Any):
    message = ""
    try:
        found = read(folder, put(RECORD, path, value))
    except DataError as error:
        found, message = None, str(error)
    if found is None:
        assert message.startswith(str(folder / "growth.json")) and len(message) < 500 and "\n" not in message
        return
    plan = Plan.from_json(found)
    # Everything that uses it: as text, as a base of the next growth, in reports.
    assert str(plan) and hash(plan) and stack(len(plan), 2).continues(plan).generation == plan.generation + 1
    assert all(layer < 4 for layers in plan.layer_map for layer in layers)
    if found["proof"] is not None:
        assert all(isinstance(found["proof"][key], float | int | None) for key in ("kl", "loss_base", "top1"))
    assert isinstance(found.get("parameters", 0), int) and isinstance(found["base"].get("name"), str | None)


DAMAGED = {
    "an infinite weight": (("rows", 0, "sources", 0, 1), float("inf"), "not finite"),
    "a weight that is not a number": (("rows", 0, "sources", 0, 1), float("nan"), "not finite"),
    "an infinite layer": (("rows", 0, "sources", 0, 0), float("inf"), "not finite"),
    "a layer that is a fraction": (("rows", 0, "sources", 0, 0), 0.5, "0 is 0.5, must be a whole number"),
    "a map in a map": (("layer_map", 0), [[0]], "[0], must be a whole number"),
    "a map beyond the first base": (("layer_map", 0), [4], "[4], must be layers of the first base"),
    "a future growth": (("rows", 0, "generation"), 3, "generation is 3, must be 0…2"),
    "a huge generation": (("rows", 0, "generation"), 10**30, "must be a whole number"),
    "a bool instead of a number": (("rows", 0, "scale"), True, "scale is True, must be a number"),
    "an unknown init": (("rows", 0, "init"), "magic", "init 'magic' is not known"),
    "an importance of strings": (("history", 0, "options", "importance"), ["a"], "must be a number"),
    "a string as the number of experts": (("experts", "count"), "8", "experts: count is '8'"),
    "experts with an unknown option": (("experts", "more"), 1, "more"),
    "a proof that is a number": (("proof",), 1.0, "keys missing or invalid: proof:"),
    "a proof that lacks a loss": (("proof", "loss_base"), ..., "keys missing or invalid: proof.loss_base:"),
    "parameters as a string": (("parameters",), "many", "keys missing or invalid: parameters:"),
    "digests of numbers": (("digests", "grown"), {"a": 1}, "keys missing or invalid: digests.grown.a:"),
    "a base whose name is a number": (("base", "name"), 3, "keys missing or invalid: base.name:"),
    "a version that is true": (("version",), True, "version True is not 1"),
    "a history of strings": (("history", 0), "x", "must be an object"),
    "too many layers": (("base", "layers"), 10**9, "more than the 10,000"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case: str, folder: Path):
    path, value, message = DAMAGED[case]
    with pytest.raises(DataError) as error:
        read(folder, put(RECORD, path, value))
    assert message in str(error.value)
