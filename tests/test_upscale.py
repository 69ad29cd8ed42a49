"""``tli-jax upscale`` end to end, on the base model in the package."""

import contextlib
import hashlib
import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest

from tli_jax import report, upscale
from tli_jax.cli.frame import run_command
from tli_jax.data.embedded import embedded_text
from tli_jax.growth.methods import tli
from tli_jax.growth.plan import Plan
from tli_jax.hf.checkpoint import expected_shapes, open_checkpoint
from tli_jax.hf.grown_tensors import grown_tensors
from tli_jax.hf.output import staged
from tli_jax.hf.shards import OutputTensor, make_header, split_shards
from tli_jax.hf.tensors import read_tensor
from tli_jax.models.shapes import SHAPES

GROWTH_KEYS = [
    "version",
    "method",
    "options",
    "base",
    "rows",
    "layer_map",
    "injected",
    "trainable",
    "experts",
    "guarantee",
    "digests",
    "proof",
    "history",
]
PROOF_KEYS = ["tokens", "dtype", "max_abs_logit_difference", "kl", "loss_base", "loss_grown", "top1"]


def run(*flags):
    return run_command(upscale.main, [str(flag) for flag in flags])


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """The embedded base grown with the defaults, 12 → 15 layers."""
    output = tmp_path_factory.mktemp("upscale") / "grown"
    assert run("--model", "embedded", "--output", output) == 0
    return output


def test_output_is_a_complete_model_folder(grown):
    names = {file.name for file in grown.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "growth.json", "README.md"} <= names
    assert json.loads((grown / "config.json").read_text())["num_hidden_layers"] == 15
    assert not [file for file in grown.parent.iterdir() if file != grown]


def test_growth_record(grown):
    record = json.loads((grown / "growth.json").read_text())
    assert set(GROWTH_KEYS) <= record.keys()
    assert set(PROOF_KEYS) <= record["proof"].keys()
    assert record["guarantee"] == "bit"
    assert record["proof"]["max_abs_logit_difference"] == 0
    assert record["proof"]["loss_base"] == record["proof"]["loss_grown"]
    assert record["proof"]["tokens"] >= 128
    plan = Plan.from_json(record)
    assert [number for number, injected in enumerate(plan.injected) if injected] == [4, 9, 14]
    checkpoint = open_checkpoint(grown)
    for name, digest in record["digests"]["grown"].items():
        assert hashlib.sha256(read_tensor(checkpoint.tensors[name]).tobytes()).hexdigest() == digest


def test_model_card_describes_the_growth(grown):
    card = (grown / "README.md").read_text()
    assert "tli" in card
    assert "12 → 15 layers" in card
    assert "max |Δlogit| 0" in card


def test_a_grown_model_grows_again_with_one_layer_map(grown, tmp_path):
    assert run("--model", grown, "--output", tmp_path / "again", "--method", "dus", "--drop", 5, "--no-proof") == 0
    record = json.loads((tmp_path / "again" / "growth.json").read_text())
    assert len(record["rows"]) == 20
    assert record["layer_map"][4] == [3]  # injected by the first growth, from base layer 3
    assert record["rows"][4]["generation"] == 1
    assert not record["rows"][4]["injected"]
    assert record["rows"][10]["generation"] == 2
    assert [step["method"] for step in record["history"]] == ["tli"]
    assert record["proof"] is None


def test_transformers_gives_the_same_logits_and_the_loss_that_the_proof_reports(grown, tmp_path):
    torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tli_jax.hf import hub, tokens

    base = hub.resolve("embedded")
    checkpoint = open_checkpoint(base)
    ids = AutoTokenizer.from_pretrained(base).encode(embedded_text(), add_special_tokens=False)
    windows = torch.tensor(tokens.windows(ids, checkpoint.config, 2048, 512), dtype=torch.long)
    logits = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(windows).logits for f in (base, grown)]
    assert torch.equal(*logits)
    for init in ("copy", "half"):
        output = tmp_path / init
        assert run("--model", "embedded", "--output", output, "--init", init) == 0
        proof = json.loads((output / "growth.json").read_text())["proof"]
        windows = tokens.windows(ids, checkpoint.config, proof["tokens"], 512)
        windows = torch.tensor(windows, dtype=torch.long)
        with torch.no_grad():
            loss = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)(windows, labels=windows).loss
        # The proof runs in the stored bf16, transformers in fp32. An fp32 base is tested elsewhere, to 1e-4.
        assert abs(float(loss) - proof["loss_grown"]) < 2e-2


def sparse_folder(folder, config, pieces):
    """A model of sparse files: real headers and sizes, but no data on disk."""
    shards = split_shards(pieces, 5 * 10**9)
    for name, shard in shards.items():
        header = make_header(shard)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(piece.nbytes for piece in shard))
    index = {"weight_map": {piece.name: name for name, shard in shards.items() for piece in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))


@pytest.mark.parametrize(("shape", "every"), [("llama3.1-70b", 4), ("llama3.1-405b", 8)])
def test_growth_at_size(tmp_path, capsys, shape, every):
    """Everything but the copying of bytes, at the real size: the plan, names and file layout."""
    config = SHAPES[shape]
    layers, grown_layers = config.num_hidden_layers, config.num_hidden_layers + config.num_hidden_layers // every
    base, output = tmp_path / "base", tmp_path / "grown"
    base.mkdir()
    pieces = [OutputTensor(n, "BF16", s) for n, s in expected_shapes(config).items()]
    sparse_folder(base, config, pieces)
    before = sorted(base.iterdir())
    assert run("--model", base, "--plan-only", "--json", "--every", every, "--shape", shape) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["before"]["parameters"] == config.num_params and found["is_exact"]
    assert found["after"]["layers"] == grown_layers
    assert found["after"]["bytes"] == 2 * found["after"]["parameters"]
    assert sorted(tmp_path.iterdir()) == [base] and sorted(base.iterdir()) == before

    opened = open_checkpoint(base)
    plan = tli(layers, every)
    with staged(output, 0) as partial:
        sparse_folder(partial, config.with_layers(grown_layers), grown_tensors(opened, plan))
        (partial / "growth.json").write_text(json.dumps(plan.to_json()))
    grown = open_checkpoint(output)
    assert grown.config.num_hidden_layers == grown_layers and grown.nbytes == found["after"]["bytes"]
    names = {name for name in found["writes"] if name.endswith(".safetensors")}
    assert {file.name for file in output.glob("*.safetensors")} == names


def test_json_mode_prints_only_json_to_stdout(tmp_path, capsys):
    assert run("--model", "embedded", "--output", tmp_path / "out", "--json", "--no-proof") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["after"]["layers"] == 15
    assert "12 → 15 layers" in captured.err


def test_sample_is_the_same_text_for_an_exact_growth(tmp_path, capsys):
    assert run("--model", "embedded", "--output", tmp_path / "out", "--sample", "def ", "--no-proof") == 0
    base, grown = [
        line.split(" continues: ")[1] for line in capsys.readouterr().out.splitlines() if " continues: " in line
    ]
    assert base == grown
    assert len(base) > 20


def test_flags_override_the_configuration_file(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("model: embedded\nmethod: tli\nevery: 3\nplan_only: true\n")
    assert run("--config", file) == 0
    assert "12 → 16 layers" in capsys.readouterr().out
    assert run("--config", file, "--every", "2") == 0
    assert "12 → 18 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "layers"),
    [
        (("--method", "dus", "--drop", "3"), 18),
        (("--method", "llama_pro", "--groups", "4"), 16),
        (("--method", "stack", "--times", "2"), 24),
        (("--method", "interpose", "--after", "1,2"), 14),
        (("--method", "slayer"), 15),
        (("--method", "average", "--after", "5"), 13),
        (("--method", "custom", "--layers", "0-3, 3*0, 4-11"), 13),
        (("--init", "noise", "--every", "6", "--scale", "0"), 14),
        (("--method", "opt_deus", "--after", "9"), 13),
        (("--method", "lesa", "--after", "9"), 13),
        (("--method", "midas", "--block", "2"), 14),
        (("--method", "lidas", "--block", "2"), 14),
        (("--method", "adept", "--count", "2"), 14),
        (("--method", "moe", "--experts", "2", "--upcycle", "drop", "--noise-ratio", "0.1"), 12),
        (("--every", "6", "--experts", "2", "--granularity", "2", "--upcycle", "virtual_groups"), 14),
    ],
)
def test_every_method_from_the_command_line(flags, layers, tmp_path):
    (tmp_path / "text").write_text("def add(a, b):\n    return a + b\n" * 10)  # short, because this test has many cases
    assert run("--model", "embedded", "--output", tmp_path / "out", "--text", tmp_path / "text", *flags) == 0
    record = json.loads((tmp_path / "out" / "growth.json").read_text())
    assert len(record["rows"]) == layers
    assert open_checkpoint(tmp_path / "out").config.num_hidden_layers == layers
    is_same = record["proof"]["max_abs_logit_difference"] == 0
    assert is_same == (record["guarantee"] == "bit")


def test_an_option_of_another_method_is_refused(capsys):
    assert run("--model", "embedded", "--plan-only", "--method", "dus", "--every", "2") == 2
    assert "every: not an option of method dus" in capsys.readouterr().err


def test_a_broken_guarantee_names_the_layer_and_leaves_no_output(tmp_path, monkeypatch, capsys):
    """Simulates a faulty writer: residual outputs that should be zero are not."""

    ones = lambda nbytes: iter([np.ones(nbytes // 2, "bfloat16").view(np.uint8).data])  # noqa: E731
    monkeypatch.setattr("tli_jax.hf.grown_tensors._zeros", ones)
    assert run("--model", "embedded", "--output", tmp_path / "out", "--every", "6") == 65
    assert "differ after layer 6 of the grown model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_report_compares_and_draws(grown, tmp_path, capsys):
    from tli_jax.report import main

    assert run_command(main, [str(grown), "--layer-maps", str(tmp_path / "maps.svg")]) == 0
    assert "tli identity" in capsys.readouterr().out
    drawing = (tmp_path / "maps.svg").read_text()
    assert drawing.count(">new<") == 3
    assert report.__doc__


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path):
    arguments = [sys.executable, "-m", "tli_jax.upscale", "--model", "embedded", "--no-proof", "--overwrite"]
    arguments += ["--output", str(tmp_path / "out")]
    plain = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "write done in" in plain.stderr
    assert "\x1b" not in plain.stdout + plain.stderr
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(arguments, stderr=theirs, stdout=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    shown = b""
    # Linux reports EIO instead of end of file once the other side of a terminal is closed.
    with contextlib.suppress(OSError):
        while chunk := os.read(ours, 4096):
            shown += chunk
    os.close(ours)
    assert process.wait() == 0
    assert b"\x1b[" in shown
    assert b"write" in shown
