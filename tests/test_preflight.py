"""The checks before a run, on real faults and with real compilation."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tli_jax import preflight, prepare
from tli_jax.checks import files
from tli_jax.checks import preflight as checks
from tli_jax.checks.context import Context
from tli_jax.cli.frame import run_command
from tli_jax.cli.growth_config import PreflightConfig, UpscaleConfig
from tli_jax.cli.libtpu import has_compiler
from tli_jax.cli.parse import parse
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.models.shapes import SHAPES

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(path.name for path in CONFIGS.glob("llama*.yaml"))
LARGE = {"train.batch-size": 2**20, "train.sequence-length": 64, "train.remat": "none"}
pytestmark = pytest.mark.usefixtures("_compile_once")
needs_libtpu = pytest.mark.skipif(not has_compiler(), reason="the TPU compiler is not installed, jax[tpu]")


@pytest.fixture
def check(capsys, tmp_path, start, monkeypatch):
    """Run the command on a small model. Returns its findings by name, and its stderr."""
    select_checks = checks.select_checks

    def check(*flags, code=0, config=None, until=None, **keys):
        """With ``until``, the checks after that one are left out, as the last two compile."""

        def select(context):
            selected = select_checks(context)
            names = list(selected)
            return {name: selected[name] for name in names[: names.index(until) + 1 if until else None]}

        monkeypatch.setattr(checks, "select_checks", select)
        usual = {"model": start / "base", "output": tmp_path / "grown", "every": 2, "train.run": tmp_path / "run"}
        usual |= {"train.text": start / "ids.npy", "train.sequence-length": 16, "train.only": "injected"}
        usual = {} if config else usual
        words = [f"--{key.replace('_', '-')}={value}" for key, value in (usual | keys).items() if value is not None]
        words += [f"--config={config}"] if config else []
        assert run_command(preflight.main, ["--json", *words, *flags]) == code
        out, err = capsys.readouterr()
        return {finding["name"]: finding for finding in json.loads(out)["checks"]} if out else {}, err

    return check


def statuses(found):
    return {name: finding["status"] for name, finding in found.items()}


def test_everything_is_checked_and_nothing_is_written(check, start, tmp_path):
    found, err = check("--strict")
    assert set(statuses(found).values()) == {"ok"}
    assert list(found) == [
        *("model", "growth", "processes", "mesh", "run", "data", "disk", "growth compiles", "step compiles")
    ]
    assert not list(tmp_path.iterdir())
    step = found["step compiles"]
    assert 0 < step["arguments"] < step["peak"] < step["limit"]
    assert step["collectives"]  # the tests' CPU shows eight devices
    base = open_checkpoint(start / "base").config
    grown = base.with_layers(6)
    assert (found["growth"]["parameters"], found["growth"]["bytes"]) == (grown.num_params, 4 * grown.num_params)
    # Parameters and two moments of the trainable layers in fp32, and five scalars; frozen layers as stored.
    assert found["run"]["step_bytes"] == 3 * 4 * (grown.num_params - base.num_params) + 4 * 4
    assert found["run"]["frozen_bytes"] == 4 * base.num_params
    assert next(line.split()[0] for line in err.splitlines() if "  ok  " in line) == "model"


def test_growth_while_loading_is_checked_without_an_output(check):
    found, _ = check(output=None, every=None, until="disk", **{"train.grow.every": 1})
    assert set(statuses(found).values()) == {"ok"}
    assert "4 → 8 layers" in found["growth"]["text"] and "bytes" not in found["growth"]
    assert "grown model" not in found["disk"]["text"]


def test_missing_inputs_fail_only_with_strict(check, tmp_path):
    inline = tmp_path / "shape.yaml"
    inline.write_text(
        "shape: {vocab_size: 128, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 8,"
        " num_attention_heads: 4, max_position_embeddings: 64}\n"
        f"model: nobody/nothing\noutput: {tmp_path}/grown\n"
        f"train: {{run: {tmp_path}/run, text: [{tmp_path}/corpus], only: injected, sequence_length: 16}}\n"
    )
    found, _ = check(config=inline)
    expected = {"model": "not checked", "growth": "ok", "data": "not checked", "step compiles": "ok"}
    assert statuses(found) | expected == statuses(found)
    assert "8 layers" in found["model"]["text"]
    _, err = check("--strict", config=inline, code=2, until="data")
    assert err.splitlines()[-1].startswith("error: strict: not checked: model, data")


@pytest.mark.parametrize(
    ("keys", "code", "name", "message"),
    [
        ({"model": "/nowhere"}, 66, "model", "/nowhere"),
        ({"shape": "llama3.1-8b"}, 65, "model", "hidden_size is 32, not 4096"),
        ({"shape": "llama3-8b", "model": "a/b"}, 2, "model", "did you mean llama3.1-8b?"),
        ({"every": 40}, 2, "growth", "every is 40"),
        ({"train.grow.every": 2}, 2, "growth", "train.grow: the output is grown already"),
        ({"train.run": ""}, 2, "run", "run is not set"),
        ({"train.mesh": "data=3"}, 2, "mesh", "does not give the 8 devices"),
        ({"train.keep": 10**9}, 2, "disk", "keep fewer checkpoints"),
        ({"train.text": ""}, 2, "data", "text is not set"),
    ],
)
def test_failed_check_sets_the_exit_code_and_the_error(check, keys, code, name, message):
    found, err = check(**keys, code=code, until=name)
    assert found[name]["status"] == "fails" and message in found[name]["text"]
    assert err.splitlines()[-1] == f"error: {found[name]['text']}"


def test_step_that_does_not_fit_suggests_flags(check):
    found, err = check(code=2, **LARGE, **{"train.only": "all"})
    text = found["step compiles"]["text"]
    assert found["step compiles"]["status"] == "fails" and text.startswith("does not fit: needs")
    assert err.splitlines()[-1] == f"error: {text}"
    for flag in ("--train.remat full", "--train.grad-accum-steps 0", "--train.only injected", "a larger slice"):
        assert flag in text
    assert found["step compiles"]["peak"] > found["step compiles"]["limit"]


def test_gpus_are_judged_on_paper(check):
    keys = {"topology": "h100-16", "train.batch-size": 16, "train.mesh": "fsdp=16"}
    found, _ = check(**keys)
    assert found["mesh"]["mesh"] == {"data": 1, "fsdp": 16, "expert": 1, "tensor": 1}
    assert found["growth compiles"]["status"] == "not checked"
    step = found["step compiles"]
    assert step["status"] == "ok" and step["remat"] == "none" and "not compiled" in step["text"]
    assert 0 < step["on_paper"]["peak"] < step["limit"] and "peak" not in step
    found, err = check(code=2, topology="h100-1", **LARGE)
    assert "does not fit, on paper: needs" in err and not found["step compiles"]["fits"]


def test_existing_output_is_refused(check, tmp_path):
    (tmp_path / "grown").mkdir()
    (tmp_path / "grown" / "config.json").write_text("{}")
    found, _ = check(code=73, until="growth")
    assert "not empty" in found["growth"]["text"]


def test_training_without_growth(check, start, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(f"model: {start}/grown\nrun: {tmp_path}/run\ntext: {start}/ids.npy\nsequence_length: 16\n")
    found, _ = check(config=file)
    assert "growth" not in found and set(statuses(found).values()) == {"ok"}
    assert found["data"]["tokens"] == 4001
    found, _ = check(config=file, code=2, until="data", **{"train.sequence_length": 5000})
    assert "fewer tokens than one window" in found["data"]["text"]


def test_tokens_are_estimated_from_a_sample(check, tmp_path, monkeypatch):
    text = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(5000))
    (tmp_path / "corpus.txt").write_text(text)
    flags = {"model": "embedded", "train.text": tmp_path / "corpus.txt"}
    complete, _ = check(until="data", **flags)
    monkeypatch.setattr(files, "_SAMPLE", 20_000)
    sampled, _ = check(until="data", **flags)
    assert abs(sampled["data"]["tokens"] / complete["data"]["tokens"] - 1) < 0.1


def test_prepared_text_is_counted_and_its_rules_are_checked(check, tmp_path, capsys):
    words = ["--model=embedded", "--text=embedded", f"--output={tmp_path / 'prepared'}", "--workers=1"]
    assert run_command(prepare.main, words) == 0
    tokens = json.loads((tmp_path / "prepared" / "manifest.json").read_text())["tokens"]
    capsys.readouterr()
    flags = {"model": "embedded", "train.text": tmp_path / "prepared"}
    assert check(until="data", **flags)[0]["data"]["tokens"] == tokens
    found, _ = check("--no-train.bos", until="data", code=2, **flags)
    assert "was prepared with bos 0 (here None)" in found["data"]["text"]


def test_run_with_other_settings_is_refused(check, start, tmp_path):
    from tli_jax import train

    flags = {"model": start / "base", "run": tmp_path / "run", "text": start / "ids.npy", "sequence_length": 16}
    file = tmp_path / "train.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in flags.items()) + "steps: 1\n")
    assert run_command(train.main, [f"--config={file}"]) == 0
    found, _ = check(config=file, until="run")
    assert "exists and would be resumed" in found["run"]["text"]
    found, _ = check(config=file, code=2, until="run", **{"train.learning-rate": 1})
    assert "learning_rate was" in found["run"]["text"]


@pytest.mark.long
def test_search_finds_the_largest_batch(check):
    found, err = check("--search", **{"train.batch-size": 16})
    largest = found["step compiles"]["largest"]
    assert largest == {"none": 2, "dots": 2, "attention": 2, "full": 2}  # 16 sequences over eight devices
    assert found["step compiles"]["flags"] == "--train.remat none --train.grad-accum-steps 1"
    assert "remat none, 2 sequences per device: fits" in err


@pytest.mark.all_cores
def test_two_processes_report_their_versions_and_devices(start, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [f"--model={start}/grown", f"--train.run={tmp_path}/run", f"--train.text={start}/ids.npy", "--json"]
    words += ["--train.sequence-length=16", "--train.only=injected"]
    devices = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tli_jax.preflight", *words, f"--train.process={index}/2@{address}"],
            env=os.environ | devices,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    out = outputs[0][0]
    found = {finding["name"]: finding for finding in json.loads(out[out.index("{\n") :])["checks"]}
    assert (found["processes"]["processes"], found["processes"]["devices"]) == (2, 4)
    assert found["mesh"]["mesh"] == {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}
    assert '"checks"' not in outputs[1][0]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_name_a_shape_and_grow_it(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = parse(PreflightConfig, "", "", [f"--config={CONFIGS / name}"])
    assert parse(UpscaleConfig, "", "", [f"--config={CONFIGS / name}"]).train == config.train
    assert name.startswith(f"{config.shape}-") and config.train is not None and config.train.only == "injected"
    context = Context(config)
    assert checks.run_check("model", files.check_model, context).status == "not checked"
    assert checks.run_check("growth", files.check_growth, context).status == "ok"
    layers = SHAPES[str(config.shape)].num_hidden_layers
    assert context.plan is not None
    expected = {"dus": 2 * (layers - 8), "llama_pro": layers + 8, "tli": layers + layers // 4}
    assert len(context.plan) == expected[config.method]


@needs_libtpu
class TestTopologies:
    """Compiled for slices that this machine does not have."""

    def test_a_small_model_on_a_small_slice(self, check):
        found, _ = check(**{"topology": "v5e-4", "train.batch-size": 4, "train.sequence-length": 128})
        assert found["mesh"]["mesh"]["fsdp"] == 4 and "splash" in found["mesh"]["text"]
        step = found["step compiles"]
        assert step["status"] == "ok" and step["limit"] == 15.75 * 2**30
        assert step["collectives"]["all-gather"] > 0

    def test_two_slices_are_data_parallel(self, check):
        found, _ = check(**{"topology": "v5e-4", "slices": 2, "train.attention": "xla"})
        assert found["mesh"]["mesh"] == {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}
        assert found["step compiles"]["status"] == "ok"

    def test_full_training_of_8b_does_not_fit_eight_chips(self, check):
        """At the real size of the model."""
        config = CONFIGS / "llama3.1-8b-tli.yaml"
        found, _ = check(config=config, topology="v5e-8", code=2, **{"train.only": "all"})
        assert found["step compiles"]["text"].startswith("does not fit: needs")
        assert "of 15.8 GiB; try " in found["step compiles"]["text"]
        assert "--train.only injected" in found["step compiles"]["text"]
        assert found["growth compiles"]["status"] == "ok"


@needs_libtpu
@pytest.mark.topologies
@pytest.mark.parametrize(
    ("name", "slice_", "keys"),
    [
        ("llama3.1-8b-tli", "v5e-8", {}),
        ("llama3.1-8b-tli", "v5e-4", {"train.sequence-length": 2048}),
        ("llama3.1-8b-tli", "v6e-64", {"train.only": "all"}),
        ("llama3.1-8b-tli", "v5p-64", {"train.only": "all"}),
        ("llama3.1-70b-tli", "v6e-256", {"train.only": "all"}),
        ("llama3.1-405b-tli", "v5p-1024", {"train.only": "all"}),
    ],
)
def test_estimates_agree_with_the_compiler(check, name, slice_, keys):
    found, _ = check(config=CONFIGS / f"{name}.yaml", topology=slice_, **keys)
    step = found["step compiles"]
    assert step["status"] == "ok" and step["peak"] < step["limit"]
    assert abs(step["on_paper"]["peak"] / step["peak"] - 1) < 0.1


@pytest.mark.skipif(has_compiler(), reason="the TPU compiler is installed")
def test_without_the_compiler_a_slice_is_not_checked(check):
    found, _ = check(topology="v5e-4", until="mesh")
    assert found["mesh"]["status"] == "not checked" and "jax[tpu]" in found["mesh"]["text"]


def test_batch_is_split_for_the_mesh(check):
    """grad_accum_steps 0 means microbatches of one sequence per device."""
    found, _ = check(until="mesh", **{"train.batch-size": 64, "train.grad-accum-steps": 0})
    assert found["mesh"]["sequences_a_device"] == 1 and "8 per step" in found["mesh"]["text"]
