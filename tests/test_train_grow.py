"""Growth while loading: the same losses, checkpoints and export as growth to a folder that is then trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from tli_jax import train, upscale
from tli_jax.cli.frame import run_command
from tli_jax.cli.growth_options import GrowthOptions
from tli_jax.errors import UsageError
from tli_jax.growth.plan import Plan
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.tensors import read_tensor
from tli_jax.upscaling.loading import grow_while_loading

pytestmark = pytest.mark.usefixtures("_compile_once")

LONG = pytest.mark.long  # hf/test_grown_checkpoint.py compares the loaded arrays of every kind
# Options of growth, as flags: copies and zeros, sums, random numbers, experts, and a method that reads a list.
GROWTHS = {
    "zeros": {"method": "tli", "every": 2},
    "sums": {"method": "average", "every": 2},
    "random": {"method": "tli", "every": 2, "init": "noise", "seed": 3},
    "experts": {"method": "custom", "layers": "0-3, 3*0.5", "experts": 2, "upcycle": "drop"},
    "predicted": {"method": "lesa"},
}


def call(main: Any, **flags: Any) -> int:
    return run_command(main, [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()])


def options(start: Path, **more: Any) -> dict[str, Any]:
    basic = {"text": start / "ids.npy", "batch_size": 8, "sequence_length": 16, "learning_rate": 0.01, "remat": "none"}
    basic |= {"steps": 3, "save_every": 2, "dtypes": "compute=float32"}
    return basic | more


def grow(growth: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {f"grow.{name}": value for name, value in growth.items()} | more


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def losses(run: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in ("step", "loss", "gradient_norm")] for line in lines]


def saved(run: Path) -> dict[str, Any]:
    """The digest of every array of every checkpoint."""
    files = sorted((run / "checkpoints").glob("*/meta/meta.json"))
    return {file.parts[-3]: read(file)["content"]["arrays"] for file in files}


def tensors(folder: Path) -> dict[str, bytes]:
    return {name: read_tensor(tensor).tobytes() for name, tensor in open_checkpoint(folder).tensors.items()}


@pytest.mark.parametrize("name", [name if name == "zeros" else pytest.param(name, marks=LONG) for name in GROWTHS])
def test_growth_while_loading_equals_growth_before(start: Path, tmp_path: Path, name: str):
    growth = GROWTHS[name]
    only = {"only": "injected"} if name != "experts" else {}
    assert call(upscale.main, model=start / "base", output=tmp_path / "grown", **growth) == 0
    for folder, model in {
        "after": {"model": tmp_path / "grown"},
        "while": grow(growth, model=start / "base"),
    }.items():
        flags = options(start, run=tmp_path / folder / "run", export=tmp_path / folder / "out", **model, **only)
        assert call(train.main, **flags) == 0
    before, during = tmp_path / "after", tmp_path / "while"
    assert losses(before / "run") == losses(during / "run")
    assert saved(before / "run") == saved(during / "run")
    assert tensors(before / "out") == tensors(during / "out")
    assert read(before / "out" / "config.json") == read(during / "out" / "config.json")
    records = [read(folder / "out" / "growth.json") for folder in (before, during)]
    # What takes a pass over the weights before training is missing, and there is never a proof.
    assert records[1]["proof"] is None and records[1]["proof_before_training"] is None
    assert "proof" in records[1].pop("not_proved") and records[0].pop("not_proved") is None
    assert records[0].pop("proof_before_training") is not None
    assert records[0]["digests"].pop("base") and records[1]["digests"].pop("base") is None
    for record in records:
        for key in ("proof_before_training", "nonfinite", "computed"):
            record.pop(key, None)
        record["training"].pop("run")  # ids of runs are random
    assert records[0] == records[1]
    assert {file.name for file in (before / "out").iterdir()} == {file.name for file in (during / "out").iterdir()}


def test_a_grown_run_resumes_and_refuses_another_plan(start: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    growth = grow(GROWTHS["experts"], model=start / "base")
    assert call(train.main, **options(start, run=run, **growth)) == 0
    assert "not proved" in capsys.readouterr().err
    assert call(train.main, run=run, steps=4) == 0
    assert [step for step, *_ in losses(run)] == [1, 2, 3, 4]
    assert call(train.main, run=run, steps=5, **{"grow.experts": 3}) == 2
    assert "was started with other options: grow.experts was 2, is 3: change" in capsys.readouterr().err


def test_growth_of_a_grown_model_continues_its_history(start: Path):
    base = open_checkpoint(start / "grown")
    grown = grow_while_loading(GrowthOptions(method="dus"), base, "grown")
    record = grown.growth
    assert record is not None and record["method"] == "dus" and record["base"]["name"] == "grown"
    assert [growth["method"] for growth in record["history"]] == ["tli"]
    assert len(Plan.from_json(record)) == grown.config.num_hidden_layers == 10


def test_methods_that_read_a_text_are_refused(start: Path):
    base = open_checkpoint(start / "base")
    with pytest.raises(UsageError, match=r"adept measures the layers on a text: grow with tli-jax upscale, or give"):
        grow_while_loading(GrowthOptions(method="adept"), base, "base")
    grown = grow_while_loading(GrowthOptions(method="adept", after=(1,)), base, "base")
    assert grown.config.num_hidden_layers == 5
