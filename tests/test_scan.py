"""The scan: losses of plans without growing them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest

import tli_jax
import tli_jax.scan as command
from tli_jax import upscale
from tli_jax.cli.frame import run_command
from tli_jax.data.embedded import held_out_modules, topics
from tli_jax.distributed.mesh import make_mesh, param_sharding
from tli_jax.errors import UsageError
from tli_jax.hf import hub
from tli_jax.hf import tokens as tokens_of
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.models.tree import nest
from tli_jax.reporting.scan import make_tables
from tli_jax.reporting.scan_page import write_scan_report
from tli_jax.verify import scan as scanning
from tli_jax.verify.scan import Scanner, base_steps, scan
from tli_jax.verify.scan_job import make_plans
from tli_jax.verify.search import find_layers

L = 12
BASE = ("--model", "embedded", "--text", "embedded", "--tokens", 64, "--window", 32)
OPTIONS = ("--old-text", "embedded", "--what", "bypass,half,average", "--grow-to", "13,14")
# Copies, factors, weighted sums, missing layers, identities.
PLANS = {
    "base": tli_jax.custom(L, "0-11"),
    "half": tli_jax.tli(L, 3, "half"),
    "quarters": tli_jax.custom(L, "0-4, 5*0.75, 5*0.25, 6-11"),
    "average": tli_jax.average(L, 4),
    "dus": tli_jax.dus(L, 3),
    "bypass": tli_jax.custom(L, "0-3, 5-11"),
    "identity": tli_jax.tli(L, 4),
}


@pytest.fixture(scope="module")
def base():
    return tli_jax.load_hf("embedded", dtype="float32")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 1000, (3, 64))


@pytest.fixture(scope="module")
def losses(base, tokens) -> dict[str, float]:
    return dict(zip(PLANS, scan(*base, tokens, list(PLANS.values())), strict=True))


def test_losses_are_those_of_the_grown_model(base, tokens, losses) -> None:
    config, params = base
    for name, plan in PLANS.items():
        grown = tli_jax.losses(config, tli_jax.inject(params, plan), tokens).mean()
        assert losses[name] == pytest.approx(float(grown), abs=1e-5), name
    assert losses["identity"] == losses["base"] and len(set(losses.values())) == len(PLANS) - 1


def test_losses_are_those_of_transformers(base, tokens, losses, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config, params = base
    windows = torch.tensor(tokens)
    for name in ("half", "quarters", "average", "dus", "bypass"):
        plan = PLANS[name]
        tli_jax.save_hf(tmp_path / name, config, tli_jax.inject(params, plan), plan=plan)
        with torch.no_grad():
            loss = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(
                windows, labels=windows
            ).loss
        assert losses[name] == pytest.approx(loss.item(), abs=1e-5), name


def test_shared_prefixes_run_once_and_dropped_states_are_computed_again(base, tokens) -> None:
    config, params = base
    steps = base_steps(L)
    plans = [steps, *((*steps[:i], *steps[i + 1 :]) for i in range(L))]  # the base, and each layer bypassed
    roomy = Scanner(config, params, tokens)
    tight = Scanner(config, params, tokens, kept_bytes=1)
    assert roomy.losses(plans) == tight.losses(plans)
    assert roomy.layers_run == L + sum(range(L)) < tight.layers_run < L * L


@pytest.mark.parametrize("axes", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_batches_of_plans_have_the_losses_of_single_plans(base, tokens, losses, axes) -> None:
    """Plans that share layers at the end, and plans that share none."""
    config, params = base
    steps = base_steps(L)
    plans = [steps, *((*steps[:i], *steps[i + 1 :]) for i in range(L))]
    plans += [scanning.to_steps(plan, config) for plan in PLANS.values()]
    single = Scanner(config, params, tokens, batch=1)
    batched = Scanner(config, params if axes is None else shard(config, params, axes), tokens, batch=4)
    compiled = scanning._run._cache_size()
    assert batched.losses(plans) == pytest.approx(single.losses(plans), abs=1e-5)
    assert batched.layers_run < single.layers_run
    assert scanning._run._cache_size() <= compiled + 3  # a plan, a batch, and a plan without a mesh


def shard(config, params, axes):
    mesh = make_mesh(axes)
    dims = {f"layers.{name}": ("L", *dims) for name, dims in config.layer_tensors.items()} | config.outer_tensors
    return jax.device_put(params, nest({name: param_sharding(mesh, letters) for name, letters in dims.items()}))


def test_no_plan_compiles_anew(base, tokens, losses) -> None:
    compiled = scanning._run._cache_size()
    scan(*base, tokens, [tli_jax.midas(L, 5), tli_jax.stack(L)])
    assert scanning._run._cache_size() == compiled


def test_on_a_mesh(base, tokens, losses) -> None:
    config, params = base
    sharded = shard(config, params, {"data": 2, "fsdp": 2, "tensor": 2})
    assert scan(config, sharded, tokens, list(PLANS.values())) == pytest.approx(list(losses.values()), abs=1e-5)


def test_what_cannot_be_scanned_is_refused(base, tokens) -> None:
    with pytest.raises(UsageError, match="made for a base of 11 layers, this one has 12"):
        scan(*base, tokens, [tli_jax.tli(11)])
    with pytest.raises(UsageError, match=r"layer 4 \(3~, init noise\) cannot be scanned: grow it"):
        scan(*base, tokens, [tli_jax.tli(L, 4, "noise")])


def test_blocks_are_repeated() -> None:
    whole, half = (make_plans(L, kind) for kind in ("blocks", "half_blocks"))
    assert len(whole) == len(half) == L * (L + 1) / 2
    assert whole[4, 6].rows == tli_jax.custom(L, "0-6, 4-11").rows
    assert half[4, 6].rows == tli_jax.custom(L, "0-3, 4-6*0.5, 4-6*0.5, 7-11").rows


def test_search_finds_sets_that_single_costs_do_not_show() -> None:
    single = {0: 3.0, 1: 0.1, 2: 0.1, 3: 0.15, 4: 0.2}

    def measure(sets):  # 1 and 2 do not go together
        return [sum(single[layer] for layer in chosen) + ({1, 2} <= set(chosen)) for chosen in sets]

    found = find_layers(single, [2, 4], measure)
    assert found == {2: ((1, 3), 0.25), 4: ((1, 2, 3, 4), pytest.approx(1.55))}


def run(*arguments: object) -> int:
    return run_command(command.main, [*map(str, arguments)])


@pytest.fixture(scope="module")
def scanned(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("scanned")
    assert run(*BASE, *OPTIONS, "--output", output) == 0
    return output


def test_scan_json(scanned: Path, base) -> None:
    results = json.loads((scanned / "scan.json").read_text())
    config, params = base
    for name, text in results["texts"].items():
        assert text["tokens"] == 64
        source = held_out_modules() if name == "old_text" else topics()
        ids = open_tokenizer(hub.resolve("embedded"), config)[0].encode("\n".join(source)[:5000])
        rows = tokens_of.windows(ids, config, 64, 32)
        costs = results["costs"][name]
        for plan, cost in (
            (tli_jax.custom(L, "0-2, 4-11"), costs["bypass"][3]),
            (tli_jax.tli(L, after=[5], init="half"), costs["half"][5]),
            (tli_jax.average(L, after=[7]), costs["average"][7]),
        ):
            grown = float(tli_jax.losses(config, tli_jax.inject(params, plan), rows).mean())
            assert cost == pytest.approx(grown - text["loss"], abs=1e-5)
    assert {len(facts) for facts in results["layers"].values()} == {L}


def test_the_plans_grow_and_have_the_loss_that_was_measured(scanned: Path, tmp_path: Path) -> None:
    results = json.loads((scanned / "scan.json").read_text())
    found = results["plans"]["14"]
    assert found["distance"] == pytest.approx(sum(map(abs, found["costs"].values())) / 2) and found["distance"] < 0.05
    assert len(found["doubled"]) == 2
    arguments = (
        "--model",
        "embedded",
        "--output",
        tmp_path / "grown",
        "--plan",
        scanned / "plan-14.json",
        "--no-proof",
    )
    assert run_command(upscale.main, [*map(str, arguments)]) == 0
    config, _ = tli_jax.load_hf(tmp_path / "grown")
    assert config.num_hidden_layers == 14
    record = json.loads((tmp_path / "grown" / "growth.json").read_text())
    assert record["method"] == "scan" and record["options"]["distance"] == found["distance"]


def test_an_interrupted_scan_resumes(scanned: Path, tmp_path: Path, capsys) -> None:
    lines = (scanned / "losses.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "losses.jsonl").write_text("".join(lines[:-20]) + lines[-20][:9])  # killed while it wrote a line
    assert run(*BASE, *OPTIONS, "--output", tmp_path) == 0
    assert sorted((tmp_path / "losses.jsonl").read_text().splitlines()) == sorted(line.strip() for line in lines)
    resumed, whole = (json.loads((folder / "scan.json").read_text()) for folder in (tmp_path, scanned))
    assert resumed == whole
    capsys.readouterr()
    assert run(*BASE, "--output", tmp_path) == 2
    assert "losses.jsonl: of a scan with another old_text: use another --output, or" in capsys.readouterr().err
    assert run(*BASE, "--output", tmp_path, "--what", "half", "--overwrite") == 0


@pytest.mark.all_cores
def test_two_processes_scan_together(scanned: Path, tmp_path: Path, compiled) -> None:
    """They give the losses of one process, and resume what process 0 has measured."""
    lines = (scanned / "losses.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "losses.jsonl").write_text("".join(lines[:-6]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    call = [sys.executable, "-W", "error", "-m", "tli_jax.scan", *map(str, (*BASE, *OPTIONS))]
    one = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    device = os.environ | compiled | {"XLA_FLAGS": one}
    started = [
        subprocess.Popen(
            [*call, "--process", f"{i}/2@{where}", "--output", tmp_path / name], env=device, stdout=subprocess.PIPE
        )
        for i, name in enumerate(("first", "second"))
    ]
    outputs = [process.communicate()[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert "best plans found" in outputs[0] and outputs[1] == "" and not (tmp_path / "second").exists()
    found, alone = (json.loads((folder / "scan.json").read_text()) for folder in (tmp_path / "first", scanned))
    for name, costs in alone["costs"].items():
        for kind, values in costs.items():
            assert found["costs"][name][kind] == pytest.approx(values, abs=1e-5)
    assert found["plans"].keys() == alone["plans"].keys()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--grow-to", 12), 2, "grow_to is 12, must be 13…24"),
        (("--what", "hlf"), 2, "must be some of bypass, copy, half"),
        (("--what", "blocks", "--grow-to", 13), 2, "grow_to needs the cost of doubling a layer"),
        (("--text", "nowhere.txt"), 66, "nowhere.txt: no such text file"),
    ],
)
def test_wrong_options(arguments, code: int, message: str, tmp_path: Path, capsys) -> None:
    assert run(*BASE, "--output", tmp_path, *arguments) == code
    assert message in capsys.readouterr().err


def grow(*arguments: object) -> int:
    return run_command(upscale.main, ["--model", "embedded", "--plan-only", *map(str, arguments)])


def test_positions(scanned: Path, capsys) -> None:
    assert grow("--init", "half", "--positions", "inner", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["plan"]["options"]["after"] == [3, 6, 9] and "warning" not in err
    assert grow("--method", "lesa", "--positions", "measured", "--scan", scanned / "scan.json", "--json") == 0
    costs = json.loads((scanned / "scan.json").read_text())["costs"].values()
    cost = [sum(abs(text["half"][layer]) for text in costs) for layer in range(L - 1)]
    assert json.loads(capsys.readouterr().out)["plan"]["options"]["after"] == sorted(np.argsort(cost)[:6].tolist())
    assert grow("--positions", "measured") == 2
    assert "positions measured needs a scan" in capsys.readouterr().err
    assert grow("--method", "dus", "--positions", "inner") == 2
    assert "method dus has no positions to choose" in capsys.readouterr().err


def test_harmful_positions_are_announced(scanned: Path, capsys) -> None:
    for arguments, warning in (
        (("--init", "half"), "duplicates layer 11: on trained bases the first two"),
        (("--init", "half", "--after", "0", "--scan", scanned / "scan.json"), "duplicates layer 0: alone they cost +"),
        (("--init", "half", "--scan", scanned / "scan.json"), None),
        (("--init", "identity"), None),
        (("--method", "dus"), None),
    ):
        assert grow(*arguments) == 0
        err = capsys.readouterr().err
        assert (warning in err) if warning else ("warning" not in err), (arguments, err)


def test_page_and_plots(scanned: Path, tmp_path: Path) -> None:
    results = json.loads((scanned / "scan.json").read_text())
    results["model"] = "<b>&"
    for costs in results["costs"].values():
        costs["half_blocks"] = [[*block, 0.01 * (block[1] - block[0])] for block in make_plans(L, "half_blocks")]
    assert write_scan_report(results, tmp_path) == ["scan.html", "layers.png", "blocks.png"]
    page = (tmp_path / "scan.html").read_text(encoding="utf-8")
    assert "<h1>&lt;b&gt;&amp;: what each layer is worth</h1>" in page and "<b>&" not in page
    # Bars of three kinds and a heatmap for each of two texts, and three facts of the layers.
    assert page.count('class="plotly-graph-div"') == 2 * (3 + 1) + 3
    for outside in ("http://", "https://"):
        assert outside not in page.split("<script>")[0] + page.split("</script>")[-1]
    for name in ("layers.png", "blocks.png"):
        assert matplotlib.image.imread(tmp_path / name).std() > 0.05
    (table,) = [table for table in make_tables(results) if table.title == "best plans found"]
    assert [row[0] for row in table.rows] == ["13", "14"]
