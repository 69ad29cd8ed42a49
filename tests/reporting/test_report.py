"""The report command: every kind of folder in its own table, as JSON too, and damaged files named."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tli_jax.cli.frame import run_command
from tli_jax.cli.train_config import TrainConfig
from tli_jax.growth.methods import tli
from tli_jax.hf import sidecar
from tli_jax.report import main
from tli_jax.reporting.layer_map import draw_svg
from tli_jax.training.metrics import Metrics
from tli_jax.training.run_directory import RunDirectory

NAME = "<img src=x onerror=alert(1)>$a_b$[red]\x1b\udcff"
SHOWN = r"<img src=x onerror=alert(1)>$a_b$[red]\x1b\udcff"
PROOF = {"tokens": 512, "text": "/home/me/secret/novel.txt", "dtype": "float32", "device": "cpu", "seconds": 1.0}
PROOF |= {"max_abs_logit": 9.0, "max_abs_logit_difference": 0.0, "kl": 0.0, "top1": 1.0, "parted_at": None}
PROOF |= {"loss_base": 1.5394, "loss_grown": 1.5394, "changes": []}
GROWTH = tli(4, every=2).to_json() | {"parameters": 123_456_789, "proof": PROOF, "versions": {"tli_jax": "0.1.0"}}
GROWTH["base"] = {"layers": 4, "name": "/home/me/secret/llama", "revision": None, "training": []}
TRAINING = {
    "run": "0123456789abcdef",
    "step": 40,
    "tokens": 81_920,
    "losses": {"validation_before": 3.25, "validation_after": 2.125, "training": 2.25},
    "only": "injected",
    "outer": [],
    "optimizer": "adamw",
    "learning_rate": {"all": 1e-4, "injected": 1e-3},
    "text": "feed" * 16,
    "base": {"name": "llama", "revision": None},
    "earlier": [],
    "versions": {"tli_jax": "0.1.0"},
}
TRAINED = GROWTH | {"proof": None, "proof_before_training": PROOF, "training": TRAINING}


def write(folder: Path, **records: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in records.items():
        sidecar.write_json(folder / f"{name}.json", content)
    return folder


def write_run(folder: Path, *losses: float | None) -> Path:
    folder.mkdir(parents=True)
    run = RunDirectory(folder)
    run.write_config(TrainConfig(run=str(folder)))
    metrics = Metrics(run, TrainConfig(), 0, "id")
    for step, loss in enumerate(losses, 1):
        line = {"step": step, "loss": loss, "tokens": 8 * step, "tokens_per_second": 100.0, "mfu": None, "skipped": 0}
        metrics.write(line | ({"validation_loss_before": 4.0} if step == 1 else {}) | {"validation_loss": loss})
    metrics.close()
    return folder


def report(capsys, *arguments: Any, code: int = 0) -> str:
    assert run_command(main, list(map(str, arguments))) == code
    shown = capsys.readouterr()
    return shown.err if code else shown.out


def test_each_kind_has_its_own_table(tmp_path, results, capsys):
    run = write_run(tmp_path / "a_run", 3.0, 2.5)
    grown = write(tmp_path / "a_growth", growth=GROWTH)
    trained = write(tmp_path / "a_model", growth=TRAINED, training=TRAINING)
    alone = write(tmp_path / "never_grown", training=TRAINING | {"only": "all"})
    compared = write(tmp_path / "a_comparison", results=results)
    shown = report(capsys, grown, run, trained, compared, alone)
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert rows["a_run"][1:6] == ["2", "16", "2.5000", "4.0000", "2.5000"]
    assert rows["a_growth"][1:8] == ["tli", "identity", "4", "→", "6", "bit", "123,456,789"]
    assert rows["a_growth"][8:] == ["1.5394", "1.5394", "+0.0000", "0.0000", "100.0", "%"]
    assert rows["a_model"][6:] == ["bit,", "KL", "0.0000", "injected", "40", "81,920", "2.2500", "3.2500", "2.1250"]
    assert rows["never_grown"][1:5] == ["–", "–", "–", "all"]
    assert "proof before training" in shown and "comparison a_comparison" in shown and "tli:identity" in shown


def test_json_has_every_kind(tmp_path, results, capsys):
    run = write_run(tmp_path / "a_run", 3.0, None)
    grown = write(tmp_path / "a_growth", growth=GROWTH)
    trained = write(tmp_path / "a_model", growth=TRAINED, training=TRAINING)
    compared = write(tmp_path / "a_comparison", results=results)
    found = json.loads(report(capsys, run, grown, trained, compared, "--json"))
    numbers = found["runs"]["a_run"]
    assert (numbers["steps"], numbers["tokens"], numbers["validation_after"]) == (2, 16, None)
    growth = {"method": "tli", "init": "identity", "base_layers": 4, "layers": 6, "guarantee": "bit"}
    model = found["grown_models"]["a_growth"]
    assert growth.items() <= model.items() and model["proof"] == PROOF and model["loss_change"] == 0.0
    model = found["trained_models"]["a_model"]
    assert (model["tokens"], model["losses"]) == ([81_920], TRAINING["losses"])
    assert model["growth"] == growth | {"proof_before_training": PROOF}
    assert found["comparisons"]["a_comparison"]["summary"] == json.loads(json.dumps(results["summary"]))


def test_narrow_terminal_loses_columns_not_digits(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    shown = report(capsys, write(tmp_path / "a_growth", growth=GROWTH))
    assert "no room for: " in shown and "+0.0000" in shown and "…" not in shown
    assert max(map(len, (line for line in shown.splitlines() if "no room" not in line))) <= 50


def test_trained_model_is_not_listed_as_grown(tmp_path, capsys):
    shown = report(capsys, write(tmp_path / "model", growth=TRAINED, training=TRAINING))
    assert "grown models" not in shown and "Δ loss" not in shown and "1.5394" not in shown


def test_consecutive_trainings_are_added(tmp_path, capsys):
    later = TRAINING | {"earlier": [TRAINING], "step": 7, "tokens": 1_000}
    assert "40 + 7" in report(capsys, write(tmp_path / "model", training=later))


def test_folders_with_the_same_name_get_their_parents(tmp_path, capsys, monkeypatch):
    for folder in ("a/x/model", "b/x/model", "b/y/model", "other"):
        write(tmp_path / folder, growth=GROWTH)
    monkeypatch.chdir(tmp_path / "b")
    shown = report(capsys, "../a/x/model", "x/model/", tmp_path / "b/y/model", "../other", "./x/model")
    names = [line.split()[0] for line in shown.splitlines() if "tli identity" in line]
    assert names == ["a/x/model", "b/x/model", "y/model", "other"]


def test_diverged_run_is_shown(tmp_path, capsys):
    shown = report(capsys, write_run(tmp_path / "run", 3.0, None), "--curves", tmp_path / "curves.png")
    assert shown.splitlines()[-2].split()[:7] == ["run", "2", "16", "–", "4.0000", "–", "3.0000"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_are_never_truncated(tmp_path, capsys):
    folder = write(tmp_path / ("long" * 50), growth=TRAINED, training=TRAINING | {"tokens": 10**15})
    shown = report(capsys, folder, write(tmp_path / ("name" * 50), growth=GROWTH | {"parameters": 10**12}))
    assert "…" not in shown and f"{10**15:,}" in shown and f"{10**12:,}" in shown and "long" * 50 in shown


def test_names_are_printed_verbatim(tmp_path, capsys):
    run, grown = write_run(tmp_path / NAME, 3.0, 2.5), write(tmp_path / ("_" + NAME), growth=GROWTH)
    shown = report(capsys, run, grown, "--curves", tmp_path / "curves.svg", "--layer-maps", tmp_path / "maps.svg")
    assert shown.count(SHOWN) == 2
    # Matplotlib draws glyphs, and puts their text into a comment.
    for file in ("curves.svg", "maps.svg"):
        drawing = (tmp_path / file).read_text(encoding="utf-8")
        assert r"$a_b$[red]\x1b\udcff" in drawing and "<img" not in drawing


def test_plots_need_something_to_draw(tmp_path, capsys):
    run, grown = write_run(tmp_path / "run", 3.0), write(tmp_path / "grown", growth=GROWTH)
    assert "--curves" in report(capsys, grown, "--curves", tmp_path / "curves.png", code=2)
    assert "--layer-maps" in report(capsys, run, "--layer-maps", tmp_path / "maps.svg", code=2)
    assert "cannot be written" in report(capsys, run, "--curves", tmp_path / "no" / "curves.png", code=73)
    assert "cannot be written" in report(capsys, grown, "--layer-maps", tmp_path / "no" / "maps.svg", code=73)


def test_nothing_to_report_on(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    assert "nothing to report on" in report(capsys, tmp_path, code=66)
    assert "loop" in report(capsys, tmp_path / "loop", code=66)
    report(capsys, tmp_path / ("n" * 300), code=66)
    (tmp_path / "measured").mkdir()
    assert "to finish it" in report(capsys, tmp_path, code=66)


OTHERS = (None, True, -1, 0.5, 10**400, "x", "\ud800", [], [None], {}, {"x": None})


def damaged(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Copies of a record in which one key is missing or has another type, in nested objects too."""
    found = []
    for key, value in record.items():
        left = copy.deepcopy(record)
        del left[key]
        found += [left, *(record | {key: other} for other in OTHERS)]
        if isinstance(value, dict):
            found += [record | {key: inner} for inner in damaged(value)]
    return found


@pytest.mark.parametrize("kind", ["growth", "training", "trained", "results"])
def test_damaged_records(tmp_path, capsys, results, kind):
    """Keys that the report does not read may be anything. For all others the error names the file."""
    config = {key: results["config"][key] for key in ("tasks", "output")}
    results |= {"starts": [], "runs": [], "summary": results["summary"][:1], "config": config}
    whole = {"growth": GROWTH, "training": TRAINING, "trained": TRAINED, "results": results}[kind]
    folder = write(tmp_path, **({"training": TRAINING} if kind == "trained" else {}))
    file = folder / f"{'growth' if kind == 'trained' else kind}.json"
    codes = set()
    for record in [whole, *damaged(whole)]:
        file.write_text(json.dumps(record))
        for flags in ([], ["--json"]):
            code = run_command(main, [str(folder), *flags])
            error = capsys.readouterr().err
            is_named = file.name in error and len(error.splitlines()) == 1
            assert code == 0 or (code == 65 and is_named), (code, error, record)
            codes.add(code)
    assert codes == {0, 65}


def test_damaged_metrics(tmp_path, capsys):
    """Damaged lines are ignored."""
    run = write_run(tmp_path / "run", 3.0, 2.5)
    first, second = (run / "metrics.jsonl").read_text().splitlines()
    for line in damaged(json.loads(second)):
        (run / "metrics.jsonl").write_text(f"{first}\n{json.dumps(line)}\n")
        assert run_command(main, [str(run)]) == 0, line
    (run / "metrics.jsonl").write_text('{"tokens": "x"}\n')
    report(capsys, run, "--curves", tmp_path / "curves.png", code=65)


def test_layer_map_is_xml(tmp_path):
    from xml.etree import ElementTree

    assert SHOWN in "".join(ElementTree.fromstring(draw_svg({NAME: tli(4, every=2)})).itertext())
