"""Locking a run directory."""

import subprocess
import sys

import pytest

from tli_jax.errors import OutputError
from tli_jax.training.run_directory import lock_directory


def test_lock_ends_with_its_process(tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from tli_jax.training.run_directory import lock_directory\n"
        "assert 'jax' not in sys.modules\n"
        "with lock_directory(pathlib.Path(sys.argv[1])): print(flush=True); time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline()
        with pytest.raises(OutputError, match="in use by another process"), lock_directory(tmp_path):
            pass
        holder.kill()
    for _ in range(2):
        with lock_directory(tmp_path):
            pass
