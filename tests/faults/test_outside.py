"""Files outside a model's folder are refused before they are opened, whichever file points to them."""

import json
import shutil
import subprocess
import sys

import pytest

from tli_jax.hf.headers import INDEX

# Runs the command and prints a line for each file opened below a folder.
WATCHED = """
import os, sys
def hook(event, arguments):
    if event in ("open", "os.listdir", "shutil.copyfile") and str(arguments[0]).startswith(sys.argv[1]):
        os.write(2, f"opened: {arguments[0]}\\n".encode())
from tli_jax import upscale
from tli_jax.cli.frame import run_command
sys.addaudithook(hook)
sys.exit(run_command(upscale.main, sys.argv[2:]))
"""


def move_and_link(name):
    def damage(base, outside):
        shutil.move(base / name, outside / name)
        (base / name).symlink_to(outside / name)

    return damage


def point_index_to(target):
    def damage(base, outside):
        shutil.copy(base / "model.safetensors", outside / "x.safetensors")
        shutil.move(base / "model.safetensors", base / "a.safetensors")
        path = target.replace("OUTSIDE", str(outside))
        (base / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": path}}))

    return damage


DAMAGES = {
    "a link to the weights": move_and_link("model.safetensors"),
    "a link to the configuration": move_and_link("config.json"),
    "an index to a path above": point_index_to("../outside/x.safetensors"),
    "an index to an absolute path": point_index_to("OUTSIDE/x.safetensors"),
    "a licence": lambda base, outside: (
        (outside / "secret").write_text("mine"),
        (base / "LICENSE").symlink_to(outside / "secret"),
    ),
    "a record of growth": move_and_link("growth.json"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_files_outside_are_never_opened(case, start, tmp_path):
    shutil.copytree(start / "grown", tmp_path / "base")
    (tmp_path / "outside").mkdir()
    DAMAGES[case](tmp_path / "base", tmp_path / "outside")
    call = [sys.executable, "-c", WATCHED, str(tmp_path / "outside"), "--model", str(tmp_path / "base"), "--no-proof"]
    call += ["--every", "1", "--output", str(tmp_path / "out")]
    ended = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 65, ended.stderr
    assert "opened: " not in ended.stderr
    assert not (tmp_path / "out").exists()
