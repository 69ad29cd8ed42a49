"""Files that are replaced atomically, and locks."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from tli_jax.errors import StorageError
from tli_jax.hf.files import lock, replace_file, storage_errors


def test_file_is_replaced_when_the_block_succeeds(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with replace_file(file) as temporary:
        assert temporary == tmp_path / ".file.partial"
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_file_is_untouched_when_the_block_fails(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail() -> None:
        with replace_file(file, "host.partial") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_system_errors_name_the_file(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "file"
    error = pytest.raises(StorageError, match=rf"{tmp_path}/no/.file.partial: cannot be written \(No such file")
    with error, storage_errors(missing), replace_file(missing) as temporary:
        temporary.write_text("new")
    with pytest.raises(StorageError, match=rf"{tmp_path}: cannot be written \(No space left"), storage_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["", "lock"], ids=["folder", "file"])
def test_lock_is_exclusive_and_ends_with_its_process(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    script = (
        "import pathlib, sys, time\nfrom tli_jax.hf.files import lock\n"
        "with lock(pathlib.Path(sys.argv[1])): print(flush=True); time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(BlockingIOError), lock(path, blocking=False):
            pass
        holder.kill()
    with lock(path, blocking=False), pytest.raises(BlockingIOError), lock(path, blocking=False):
        pass
