"""Commands as a user starts them, disks that are small, and a run that is done: what the tests of real faults share."""

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
# The rate depends on no number of steps: more of them are the same ones at first.
TRAIN += ["--save-every", "2", "--keep", "9", "--validation-fraction", "0", "--schedule", "constant"]


@pytest.fixture(scope="session")
def write_random() -> Callable[[Path, tli_jax.LlamaConfig], None]:
    """Writes a random model in fp32 as a new folder, quickly however large it is."""

    def write(folder: Path, config: tli_jax.LlamaConfig) -> None:
        draw = np.random.default_rng(0)
        flat = {name: draw.random(shape, np.float32) - 0.5 for name, shape in expected_shapes(config).items()}
        folder.mkdir()
        save_file(flat, folder / "model.safetensors", {"format": "pt"})
        sidecar.write_json(folder / "config.json", config.to_hf())

    return write


@pytest.fixture(scope="session")
def done(once, start) -> Path:
    """A folder with ``run``, four steps of the grown model with a checkpoint every two, and ``out``, its export."""

    def make(folder: Path) -> None:
        call = ["--model", start / "grown", "--text", start / "ids.npy", "--run", folder / "run", *TRAIN, "--steps", 4]
        assert run_command(train.main, [str(word) for word in call]) == 0
        assert run_command(train.main, ["--run", str(folder / "run"), "--export", str(folder / "out")]) == 0

    return once("done", make)


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return shutil.copytree(done / "run", tmp_path / "run")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system of its own, with the given options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="session")
def tli(compiled) -> Callable[..., tuple[int, str, str]]:
    """Runs ``python -m tli_jax.…`` as a process: exit code, stdout and stderr. It has to end within the time given."""

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
    """In front of a command: root may then read and write no more than the permissions of its files say."""
    if os.geteuid() != 0:
        return []
    dropped = ",".join(f"-{name}" for name in ("dac_override", "dac_read_search", "fowner", "chown"))
    words = ["setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}"]
    if shutil.which("setpriv") is None or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("setpriv is needed, which takes from root what permissions do not stop")
    return words


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file in a folder, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session", name="snapshot")
def _snapshot() -> Callable[[Path], dict[str, bytes | None]]:
    return snapshot


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, bytes]]:
    """The safetensors files of a folder."""
    return lambda folder: {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.fixture(scope="session")
def arrays() -> Callable[[Path, int], dict[str, Any]]:
    """Shape, dtype and digest of every array of a step of a run: parameters, moments and the rest."""

    def arrays(run: Path, step: int) -> dict[str, Any]:
        document = json.loads((run / "checkpoints" / str(step) / "meta" / "meta.json").read_text())
        return document["content"]["arrays"]

    return arrays
