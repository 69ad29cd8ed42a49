"""Fixtures for tests of real faults: commands in processes of their own, small disks, and a finished run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import tli_jax
from tli_jax import train
from tli_jax.cli.frame import run_command
from tli_jax.hf import sidecar
from tli_jax.hf.checkpoint import expected_shapes

TRAIN = ["--only", "injected", "--batch-size", "8", "--sequence-length", "16", "--dtypes", "compute=float32"]
# With a constant schedule the learning rate does not depend on the number of steps.
TRAIN += ["--save-every", "2", "--keep", "9", "--validation-fraction", "0", "--schedule", "constant"]


@pytest.fixture(scope="session")
def write_random() -> Callable[[Path, tli_jax.LlamaConfig], None]:
    """Write a random fp32 model to a new folder, quickly even if it is large."""

    def write(folder: Path, config: tli_jax.LlamaConfig) -> None:
        rng = np.random.default_rng(0)
        tensors = {name: rng.random(shape, np.float32) - 0.5 for name, shape in expected_shapes(config).items()}
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        sidecar.write_json(folder / "config.json", config.to_hf())

    return write


@pytest.fixture(scope="session")
def done(once, start) -> Path:
    """A folder with ``run``, four steps of the grown model with two checkpoints, and ``out``, its export."""

    def make(folder: Path) -> None:
        call = ["--model", start / "grown", "--text", start / "ids.npy", "--run", folder / "run", *TRAIN, "--steps", 4]
        assert run_command(train.main, [str(word) for word in call]) == 0
        assert run_command(train.main, ["--run", str(folder / "run"), "--export", str(folder / "out")]) == 0

    return once("done", make)


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(done / "run", tmp_path / "run")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small file system with the given options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True
        )
        if mounted.returncode:
            pytest.skip(f"cannot mount a file system: {mounted.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="session")
def tli(compiled) -> Callable[..., tuple[int, str, str]]:
    """Run ``python -m tli_jax.…`` in a process with a timeout; return exit code, stdout and stderr."""

    def tli(*call: Any, before: list[str] = [], timeout: float = 120, **environment: str):  # noqa: B006
        one = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
        module, *arguments = map(str, call)
        ended = subprocess.run(
            [*before, sys.executable, "-m", f"tli_jax.{module}", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | one | compiled | environment,
        )
        errors = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
        assert "Traceback" not in ended.stderr and len(errors) == (ended.returncode != 0), ended.stderr
        return ended.returncode, ended.stdout, ended.stderr

    return tli


@pytest.fixture(scope="session")
def unprivileged() -> list[str]:
    """A prefix for commands that makes file permissions apply to root, too."""
    if os.geteuid() != 0:
        return []
    dropped = ",".join(f"-{name}" for name in ("dac_override", "dac_read_search", "fowner", "chown"))
    words = ["setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}"]
    if shutil.which("setpriv") is None or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("needs setpriv, to make file permissions apply to root")
    return words


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """The contents of every file in a folder, and the names of every subfolder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session", name="snapshot")
def _snapshot() -> Callable[[Path], dict[str, bytes | None]]:
    return snapshot


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, bytes]]:
    """The contents of the safetensors files of a folder."""
    return lambda folder: {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.fixture(scope="session")
def arrays() -> Callable[[Path, int], dict[str, Any]]:
    """Shape, dtype and digest of every array in the checkpoint of a step."""

    def arrays(run: Path, step: int) -> dict[str, Any]:
        document = json.loads((run / "checkpoints" / str(step) / "meta" / "meta.json").read_text())
        return document["content"]["arrays"]

    return arrays
