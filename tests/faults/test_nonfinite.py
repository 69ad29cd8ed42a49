"""NaN and Inf in weights are named and counted wherever they are read, and never produce a metric."""

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
    """The base in some dtype, with two values that are not finite."""
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


def test_growth_names_nonfinite_tensors(base, tmp_path, capsys):
    call = ["--model", str(base), "--every", "2", "--no-proof", "--output", str(tmp_path / "out")]
    assert run_command(upscale.main, call) == 65
    err = capsys.readouterr().err
    assert f"{NAME} (2)" in err and "--allow-nonfinite" in err and not (tmp_path / "out").exists()
    assert run_command(upscale.main, [*call, "--allow-nonfinite"]) == 0
    assert f"{NAME} (2)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "growth.json").read_text())["nonfinite"] == {NAME: 2}


@pytest.mark.parametrize("base", ["float32"], indirect=True)
def test_evaluation_of_nonfinite_weights_is_refused(base, start, tmp_path, capsys):
    call = ["--model", str(base), "--text", str(start / "ids.npy"), "--sequence-length", "16", "--json"]
    assert run_command(evaluate.main, call) == 65
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.splitlines()[-1].startswith("error: ")
