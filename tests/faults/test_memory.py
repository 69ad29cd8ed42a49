"""Growth under a memory limit works within the documented amount; below it, it fails and leaves no output."""

import os
import shutil
import subprocess
import sys

import pytest

import tli_jax

# Runs the command in an address space that can grow by the given MiB after all imports.
LIMITED = """
import resource, sys
from tli_jax import upscale
from tli_jax.cli.frame import run_command
import tli_jax.hf.grown_tensors
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
limit = size + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(run_command(upscale.main, sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def large(write_random, tmp_path_factory):
    """A random model of 0.4 GB with a tensor of 64 MB."""
    folder = tmp_path_factory.mktemp("large") / "base"
    config = tli_jax.LlamaConfig(256, 2048, 8192, 1, 8, 8, 256)
    write_random(folder, config)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(("mib", "code"), [(100, 0), (32, 74), (1, 74)])
def test_growth_in_little_memory(large, tmp_path, mib, code):
    shutil.copy(large / "config.json", tmp_path)  # a file that must survive
    call = [sys.executable, "-c", LIMITED, str(mib), "--model", str(large), "--no-proof", "--every", "1"]
    # By default glibc reserves up to 64 MB of address space for the first allocation of each thread. That is not memory
    # in use, but it counts against RLIMIT_AS, and the rest depends on which thread allocates first.
    ended = subprocess.run(
        [*call, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )
    assert ended.returncode == code and "Traceback" not in ended.stderr, ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"] + ["out"] * (ended.returncode == 0)
    if code:
        assert ended.stderr.splitlines()[-1].startswith("error: ") and "memory" in ended.stderr
    else:
        assert (tmp_path / "out" / "model.safetensors").stat().st_size > 1.9 * 2**28
