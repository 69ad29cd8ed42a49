"""The records of a trained model: its training, the trainings before it, and the proof of its weights only."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tli_jax import train, upscale
from tli_jax.cli.frame import run_command
from tli_jax.errors import DataError
from tli_jax.hf import sidecar
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.records import read_trainings
from tli_jax.report import main as report
from tli_jax.training.record import describe_base

pytestmark = pytest.mark.usefixtures("_compile_once")
PROOF = {"tokens": 512, "text": "/home/me/novel.txt", "dtype": "float32", "device": "cpu", "seconds": 1.0}
PROOF |= {"max_abs_logit": 9.0, "max_abs_logit_difference": 0.0, "kl": 0.0, "top1": 1.0, "parted_at": None}
PROOF |= {"loss_base": 1.5, "loss_grown": 1.5, "changes": []}
EARLIER = {"run": "made up", "step": 3, "tokens": 300, "only": "all", "outer": [], "optimizer": "lion", "text": "00"}
EARLIER |= {"losses": {"validation_before": None, "validation_after": None, "training": 2.0}, "earlier": []}
EARLIER |= {"learning_rate": {"all": 1e-3}, "base": {"name": "trained", "revision": None}, "versions": {}}
TOKEN = "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"


def call(main: Any, *arguments: Any) -> None:
    assert run_command(main, list(map(str, arguments))) == 0


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def chain(once, start) -> Path:
    """A base that is trained, grown, trained twice and grown again. The first of the two trainings is made up."""

    def make(folder: Path) -> None:
        common = ["--text", start / "ids.npy", "--batch-size", 8, "--sequence-length", 16, "--remat", "none"]
        common += ["--learning-rate", "1e-3,kept=1e-4"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_TOKEN", TOKEN)

            def run(name: str, model: Path, *more: Any) -> None:
                flags = ["--model", model, "--run", folder / f"run_{name}", "--export", folder / name]
                call(train.main, *common, *flags, *more)

            base = shutil.copytree(start / "base", folder / "base")
            (base / "README.md").write_text("---\nlicense: mit\n---\n")
            run("trained", base, "--steps", 2)
            call(upscale.main, "--model", folder / "trained", "--every", 2, "--no-proof", "--output", folder / "grown")
            file = folder / "grown" / "growth.json"  # a real proof would take longer than everything else
            sidecar.write_json(file, read(file) | {"proof": PROOF})
            sidecar.write_json(folder / "grown" / "training.json", EARLIER)
            run("again", folder / "grown", "--steps", 1, "--only", "injected")
            flags = ["--model", folder / "again", "--method", "dus", "--drop", 1]
            call(upscale.main, *flags, "--no-proof", "--output", folder / "deeper")

    return once("chain", make)


def test_training_is_recorded(chain):
    record = read(chain / "trained" / "training.json")
    lines = [json.loads(line) for line in (chain / "run_trained" / "metrics.jsonl").read_text().splitlines()]
    assert (record["step"], record["tokens"]) == (2, 2 * 8 * 16)
    losses = {"validation_before": lines[0]["validation_loss_before"], "training": lines[1]["loss"]}
    assert record["losses"] == losses | {"validation_after": lines[1]["validation_loss"]}
    assert (record["only"], record["optimizer"]) == ("all", "adamw")
    assert record["learning_rate"] == {"all": 1e-3, "kept": 1e-4}
    assert record["base"] == {"name": "base", "revision": None, "card": {"license": "mit"}} and record["earlier"] == []
    assert len(record["text"]) == 64 and record["versions"].keys() >= {"tli_jax", "jax"}
    assert not (chain / "trained" / "growth.json").exists()


def test_proof_is_labelled_as_before_training(chain):
    grown, trained = read(chain / "grown" / "growth.json"), read(chain / "again" / "growth.json")
    assert grown["proof"] == PROOF
    assert trained["proof"] is None and trained["proof_before_training"] == PROOF
    assert trained["training"] == read(chain / "again" / "training.json")
    assert trained["digests"]["grown"] != grown["digests"]["grown"]


def test_records_chain(chain):
    first, second = (read(chain / name / "training.json") for name in ("trained", "again"))
    assert second["earlier"] == [{key: value for key, value in EARLIER.items() if key != "earlier"}]
    assert second["base"]["name"] == "trained"
    grown, deeper = read(chain / "grown" / "growth.json"), read(chain / "deeper" / "growth.json")
    assert grown["base"]["training"] == read_trainings(chain / "trained")
    assert [training["run"] for training in grown["base"]["training"]] == [first["run"]]
    # The trainings belong to the base of the model that was grown again; it has none of its own.
    assert [training["run"] for training in deeper["base"]["training"]] == ["made up", second["run"]]
    assert [step["base"]["training"] for step in deeper["history"]] == [grown["base"]["training"]]
    assert not deeper.keys() & {"training", "proof_before_training"} and deeper["proof"] is None
    assert read_trainings(chain / "deeper") == []
    assert open_checkpoint(chain / "deeper").growth == deeper


def test_model_cards(chain):
    names = ("trained", "grown", "again", "deeper")
    cards = {name: (chain / name / "README.md").read_text(encoding="utf-8") for name in names}
    assert "base, trained with tli_jax" in cards["trained"] and "256 tokens in 2 steps" in cards["trained"]
    assert "The base had been trained on 256 tokens in 2 steps." in cards["grown"]
    assert "Proof, run before any training" in cards["again"] and "layers `injected`" in cards["again"]
    count = read(chain / "again" / "training.json")["trainable_parameters"]
    assert f"Trainable parameters: {count:,}" in cards["again"] and count > 0
    assert "Earlier training: 300 tokens in 3 steps" in cards["again"]
    assert "It has not been trained since." in cards["deeper"]
    for card in cards.values():
        assert "\nlicense: mit\n" in card
        assert "base_model" not in card and str(chain) not in card and "/home" not in card and "/tmp" not in card


def test_report_shows_the_training(chain, capsys):
    call(report, *(chain / name for name in ("trained", "grown", "again", "deeper", "run_again")))
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    losses = read(chain / "again" / "training.json")["losses"]
    shown = [f"{losses[key]:.4f}" for key in ("training", "validation_before", "validation_after")]
    assert rows["again"][1:9] == ["tli", "identity", "4", "→", "6", "bit,", "KL", "0.0000"]
    assert rows["again"][9:] == ["injected", "3", "+", "1", "300", "+", "128", *shown]
    assert rows["deeper"][1:5] == ["dus", "6", "→", "10"] and rows["run_again"][1:3] == ["1", "128"]


def test_no_token_in_any_file(chain):
    files = [file for file in chain.rglob("*") if file.is_file()]
    assert len(files) > 50
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]


def test_base_on_the_hub(chain, tmp_path):
    """The folder in the Hub's cache names the model and the commit."""
    folder = tmp_path / "models--meta-llama--Llama-3.2-1B" / "snapshots" / "4e20de362430cd3b72f300e6b0f18e50e7166e08"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(chain / "grown")
    assert describe_base(open_checkpoint(folder))["base"] == {
        "name": "meta-llama/Llama-3.2-1B",
        "revision": folder.name,
        "card": {"license": "mit"},
    }


@pytest.mark.parametrize(
    "damage",
    [{"step": "2"}, {"tokens": -1}, {"losses": {}}, {"base": {"name": None}}, {"earlier": [{}]}, {"versions": 1}],
)
def test_damaged_record(chain, tmp_path, damage):
    (tmp_path / "training.json").write_text(json.dumps(read(chain / "again" / "training.json") | damage))
    with pytest.raises(DataError, match=rf"training\.json: .*{next(iter(damage))}"):
        read_trainings(tmp_path)
