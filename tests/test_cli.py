"""The command ``tli-jax``: its help, its suggestions, generating text, and progress without a terminal."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import rich.console

import tli_jax
from tli_jax.__main__ import COMMANDS, main
from tli_jax.cli import progress as progress_module
from tli_jax.cli.config import CompareConfig, EvaluateConfig, GenerateConfig, PrepareConfig, ScanConfig
from tli_jax.cli.frame import run_command
from tli_jax.cli.growth_config import PreflightConfig, UpscaleConfig
from tli_jax.cli.progress import progress, shorten
from tli_jax.cli.train_config import TrainConfig
from tli_jax.evaluation.continuation import continue_prompt

CONFIGS = {
    "upscale": UpscaleConfig,
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "compare": CompareConfig,
    "preflight": PreflightConfig,
    "scan": ScanConfig,
}


def call(*arguments: str) -> int:
    return run_command(main, list(arguments))


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 0
    shown = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", shown, re.MULTILINE)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"tli-jax {tli_jax.__version__}\n"
    assert call("version") == 0
    assert f"tli_jax {tli_jax.__version__}\n" in capsys.readouterr().out


def test_every_export_resolves() -> None:
    source = Path(tli_jax.__file__).read_text(encoding="utf-8")
    declared = set(re.findall(r"^    from tli_jax\.\S+ import (\w+) as \1$", source, re.MULTILINE))
    assert declared == set(tli_jax._MODULES)
    for name in tli_jax._MODULES:
        # Other tests have imported the command tli_jax.scan, which hides the function.
        assert tli_jax.__getattr__(name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tli_jax.nothing


def test_commands_import_no_jax() -> None:
    """``--help`` is fast, and JAX_PLATFORMS and the variables of libtpu are set before JAX reads them."""
    names = [name for name in COMMANDS if name != "version"]
    code = (
        f"import importlib, sys; [importlib.import_module('tli_jax.' + name) for name in {names}]; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "flax", "optax", "transformers"} & set(done.stdout.split())


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("upscle") == 2
    assert "upscle is not a command, did you mean upscale?" in capsys.readouterr().err


@pytest.mark.parametrize("name", CONFIGS)
def test_help_shows_examples_defaults_and_choices(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(capsys, name, "--help")
    assert shown.startswith(f"usage: tli-jax {name} ")
    assert 0 < shown.find("examples:") < shown.find("general:")
    fields = [field for field in dataclasses.fields(CONFIGS[name]) if field.name not in ("train", "grow")]
    for field in fields:
        assert f"--{field.name.replace('_', '-')}" in shown
        assert " ".join(field.metadata["help"].split()) in shown
    assert shown.count("(default: ") + shown.count("(required)") == len(fields)
    if name == "upscale":
        assert "one of tli, dus, llama_pro" in shown and "one of copy, identity" in shown
    if name == "train":
        assert "one of adamw, adafactor, lion, muon (default: adamw)" in shown


@pytest.mark.parametrize("name", ["upscale", "preflight"])
def test_options_of_training_have_a_help_of_their_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--train.steps" not in help_of(capsys, name, "--help")
    shown = help_of(capsys, name, "--help-train")
    for field in dataclasses.fields(TrainConfig):
        assert f"--train.{field.name.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["train", "--lr", "1e-4"], "--learning-rate"),
        (["train", "--gradient-accumulation-steps=2"], "--grad-accum-steps"),
        (["upscale", "--train.lr", "1"], "--train.learning-rate"),
        (["upscale", "--output_dir", "x"], "--output"),
        (["evaluate", "--txt", "x"], "--text"),
    ],
)
def test_likely_flags_are_suggested(arguments: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    assert f"is not known, did you mean {suggestion}?" in capsys.readouterr().err


def test_generate_continues_side_by_side(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("upscale", "--model", "embedded", "--output", str(tmp_path / "grown"), "--no-proof") == 0
    capsys.readouterr()
    flags = ["--prompt", "import os\n", "--max-new-tokens", "12"]
    assert call("generate", "--model", str(tmp_path / "grown"), "--compare-to", "embedded", *flags) == 0
    assert "both models generate the same 12 tokens" in capsys.readouterr().out
    assert call("generate", "--model", str(tmp_path / "grown"), *flags, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["continuations"]
    expected = continue_prompt("embedded", "import os\n", max_new_tokens=12)
    assert (found["text"], found["tokens"]) == (expected.text, list(expected.tokens))
    assert len(expected.tokens) == 12 and expected.text


def test_generate_samples_by_the_seed() -> None:
    a, b, other = (
        continue_prompt("embedded", "def ", temperature=1.0, seed=seed, max_new_tokens=16).tokens for seed in (0, 0, 1)
    )
    assert a == b != other


def test_generate_uses_the_chat_template(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2")
    folder = tmp_path / "chat"
    assert call("upscale", "--model", "embedded", "--output", str(folder), "--no-proof") == 0
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    chat, plain = (continue_prompt(folder, "hello", chat=value, max_new_tokens=4) for value in (None, False))
    assert (chat.is_chat, plain.is_chat) == (True, False)
    by_hand = continue_prompt(folder, "user: hello\nassistant:", chat=False, max_new_tokens=4)
    assert (chat.prompt, chat.tokens) == (by_hand.prompt, by_hand.tokens) and chat.prompt != plain.prompt
    capsys.readouterr()
    assert call("generate", "--model", "embedded", "--prompt", "x", "--chat") == 65
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x"], "model is not set"),
        (["--model", "embedded"], "prompt is not set"),
        (["--model", "embedded", "--prompt", "x " * 5000], "fills the model's context"),
    ],
)
def test_generate_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("generate", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("width", "shown"),
    [(60, "loss 2.9 · validation loss 3.1 · learning rate 1.20e-03"), (54, "loss 2.9 · validation loss 3.1"), (7, "")],
)
def test_a_note_loses_whole_parts_only(width: int, shown: str) -> None:
    assert shorten("loss 2.9 · validation loss 3.1 · learning rate 1.20e-03", width) == shown


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_a_bar_shows_its_amount_and_no_part_of_a_number(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = rich.console.Console(file=io.StringIO(), force_terminal=True, width=columns, color_system=None)
    monkeypatch.setattr("tli_jax.cli.progress.console", lambda is_stderr: screen)
    parts = ["loss 2.9583", "validation loss 3.1388", "learning rate 1.20e-03", "12,427 tokens/s"]
    with progress("train", 1000, "steps") as advance:
        advance(512, " · ".join(parts))
    line = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", screen.file.getvalue()).rstrip().splitlines()[-1]
    assert "512/1000" in line and "…" not in line
    shown = line.partition("loss")[1] + line.partition("loss")[2]
    assert shown.strip() in ["", *(" · ".join(parts[:count]) for count in range(1, 5))]
    assert (parts[0] in line) == (columns > 40) and (parts[-1] in line) == (columns == 140)


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress_module, "LINE_EVERY", 0.0)
    with progress("train", 2_000, "steps", done=500) as advance:
        advance(500, "loss 2.500")
        advance(1_000)
    first, last, end = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"train 1,000/2,000 steps · loss 2\.500 · \d+\.\d s left", first)
    assert last == "train 2,000/2,000 steps"
    assert re.fullmatch(r"train done in \d+\.\d s", end)
    with progress("write", 2_000_000) as advance:
        advance(1_500_000)
    assert capsys.readouterr().err.startswith("write 1.5 MB/2.0 MB · ")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_output_encoding(encoding: str) -> None:
    arguments = ["upscale", "--model", "embedded", "--plan-only"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-m", "tli_jax", *arguments], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding)
    assert "12 -> 15 layers" in text and "\\u" not in text


def test_a_source_tree_needs_no_installed_distribution() -> None:
    code = """
import sys
from importlib import metadata
version = metadata.version
def without(name):
    if name.replace("-", "_") == "tli_jax":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = without
from tli_jax.__main__ import main
main(["version"])
main(["upscale", "--model", "embedded", "--output", sys.argv[1] + "/grown", "--no-proof"])
"""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
