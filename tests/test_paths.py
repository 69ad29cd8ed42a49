"""Invalid paths in every option of every command give a one-line error, never an internal one."""

import importlib

import pytest

from tli_jax.cli.frame import run_command

SMALL = "--model embedded --text text.txt --sequence-length 16 --batch-size 8"
COMMANDS = {
    "upscale": ("--model embedded --output out --plan-only", ("--model", "--config")),
    "upscale ": ("--model embedded --output out", ("--output", "--text", "--plan", "--scan")),
    "train": (
        f"{SMALL} --run run --steps 1",
        ("--model", "--text", "--validation-text", "--run", "--export", "--config"),
    ),
    "evaluate": (SMALL, ("--model", "--text", "--tasks", "--config")),
    "scan": (
        "--model embedded --text text.txt --output out --tokens 64 --what half",
        ("--model", "--text", "--old-text", "--output", "--config"),
    ),
    "compare": (
        f"{SMALL} --output out --methods tli --steps 0",
        ("--model", "--text", "--old-text", "--output", "--tasks", "--config"),
    ),
}
OPTIONS = [(name, option) for name, (_, options) in COMMANDS.items() for option in options]


@pytest.mark.parametrize("path", ["loop", "n" * 300, "file/in/side"])
@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_invalid_paths(tmp_path, monkeypatch, capsys, name, option, path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    (tmp_path / "text.txt").write_text("Once upon a time there was a girl. " * 400, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"tli_jax.{name.strip()}")
    assert run_command(module.main, [*COMMANDS[name][0].split(), option, path]) in (2, 66, 73)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and path.split("/")[0] in error
