"""Weights that are NaN or Inf: named and counted, wherever they are read, and never turned into a figure."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tli_jax import evaluate, upscale
from tli_jax.cli.frame import run_command

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def base(request, start, tmp_path):
    """The base with two values that are not finite, in a dtype."""
    shutil.copytree(start / "base", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    kind = np.dtype(getattr(ml_dtypes, request.param, request.param))
    tensors = {name: tensor.astype(kind) for name, tensor in load_file(file).items()}
    tensors[NAME][1, 2:4] = np.nan, -np.inf
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"torch_dtype": request.param}))
    return tmp_path / "base"


def test_growth_names_them(base, tmp_path, capsys):
    call = ["--model", str(base), "--every", "2", "--no-proof", "--output", str(tmp_path / "out")]
    assert run_command(upscale.main, call) == 65
    said = capsys.readouterr().err
    assert f"{NAME} (2)" in said and "--allow-nonfinite" in said and not (tmp_path / "out").exists()
    assert run_command(upscale.main, [*call, "--allow-nonfinite"]) == 0
    assert f"{NAME} (2)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "growth.json").read_text())["nonfinite"] == {NAME: 2}


@pytest.mark.parametrize("base", ["float32"], indirect=True)
def test_no_loss_and_no_accuracy_comes_of_them(base, start, tmp_path, capsys):
    call = ["--model", str(base), "--text", str(start / "ids.npy"), "--sequence-length", "16", "--json"]
    assert run_command(evaluate.main, call) == 65
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.splitlines()[-1].startswith("error: ")
