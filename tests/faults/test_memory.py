"""Growth under a limit of memory: within what is promised it succeeds; without, it says so and leaves nothing."""

import os
import shutil
import subprocess
import sys

import pytest

import tli_jax

# The command, in an address space that may grow by so many MiB once everything is imported.
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
    """A random model of 0.4 GB, a tensor of 64 MB in it."""
    folder = tmp_path_factory.mktemp("large") / "base"
    config = tli_jax.LlamaConfig(256, 2048, 8192, 1, 8, 8, 256)
    write_random(folder, config)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(("mib", "code"), [(100, 0), (32, 74), (1, 74)])
def test_growth_in_little_memory(large, tmp_path, mib, code):
    shutil.copy(large / "config.json", tmp_path)  # something that must stay
    call = [sys.executable, "-c", LIMITED, str(mib), "--model", str(large), "--no-proof", "--every", "1"]
    # By default glibc reserves 64 MB of address space for the first allocation of a thread, if it gets them. That is no
    # memory, but counts against RLIMIT_AS, and how much is left then depends on which thread comes first.
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
