"""Full disks and missing permissions at several moments of growth, training and export."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tli_jax
from tli_jax import train, upscale
from tli_jax.cli.frame import run_command

pytestmark = pytest.mark.usefixtures("_compile_once")

# Fills the disk of a folder to the last byte as soon as a weight file is being written there.
FILLER = """
import pathlib, sys, time
folder, until = pathlib.Path(sys.argv[1]), time.monotonic() + 60
print("ready", flush=True)
while not any(file.stat().st_size for hidden in folder.glob(".*") for file in hidden.rglob("model.safetensors")):
    if time.monotonic() > until:
        sys.exit("nothing was written")
    time.sleep(0.0005)
with (folder / "filler").open("wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(2**20))
    except OSError:
        pass
"""


@pytest.fixture(scope="module")
def large(write_random, tmp_path_factory) -> Iterator[Path]:
    """A random model of 150 MB, which takes some time to write."""
    folder = tmp_path_factory.mktemp("large") / "base"
    config = tli_jax.LlamaConfig(256, 1024, 1024, 6, 8, 8, 128)
    write_random(folder, config)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("method", ["tli", "average"])  # copied by the kernel; written by us
def test_growth_while_another_process_fills_the_disk(method, large, start, disk, snapshot):
    parent = disk("size=300m")  # little more than the growth needs, so that the filler is in time
    shutil.copytree(start / "grown", parent / "out")
    before = snapshot(parent)
    with subprocess.Popen([sys.executable, "-c", FILLER, parent], stdout=subprocess.PIPE, text=True) as filler:
        assert filler.stdout is not None and filler.stdout.readline() == "ready\n"
        call = ["--model", str(large), "--output", str(parent / "out"), "--overwrite", "--no-proof"]
        code = run_command(upscale.main, [*call, "--method", method, "--every", "3"])
    assert filler.returncode == 0
    (parent / "filler").unlink()
    assert code == 74
    assert snapshot(parent) == before


def test_growth_checks_free_space_before_writing(large, disk, capsys):
    parent = disk("size=100m")
    assert run_command(upscale.main, ["--model", str(large), "--output", str(parent / "out"), "--no-proof"]) == 73
    assert "are needed" in capsys.readouterr().err
    assert list(parent.iterdir()) == []


def fill(folder: Path, free: int) -> Path:
    """Leave only ``free`` bytes on the disk of a folder."""
    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - free))
    return filler


def complete(run: Path) -> list[str]:
    """Steps that a run can resume from. Leftovers of a failed save have other names."""
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


# A checkpoint takes 250 kB: its first file does not fit, or a later one.
@pytest.mark.parametrize(
    "free", [pytest.param(0, marks=pytest.mark.long), 20_000, pytest.param(150_000, marks=pytest.mark.long)]
)
def test_training_on_a_full_disk_keeps_the_last_checkpoint(free, run, disk, snapshot, capsys):
    parent = disk("size=32m")
    shutil.copytree(run, parent / "run")
    filler = fill(parent, free)
    before = snapshot(parent / "run" / "checkpoints")
    assert run_command(train.main, ["--run", str(parent / "run"), "--steps", "10"]) == 74
    assert "No space left on device" in capsys.readouterr().err
    assert complete(parent / "run") == ["2", "4"]
    assert before.items() <= snapshot(parent / "run" / "checkpoints").items()
    filler.unlink()
    assert run_command(train.main, ["--run", str(parent / "run"), "--steps", "6"]) == 0


def test_process_with_a_full_disk_exits(run, disk, tli):
    parent = disk("size=32m")
    shutil.copytree(run, parent / "run")
    filler = fill(parent, 100_000)
    code, _, err = tli("train", "--run", parent / "run", "--steps", 10, timeout=60)
    assert code == 74 and "No space left on device" in err
    filler.unlink()


@pytest.mark.long
def test_run_after_a_full_disk_ends_like_an_uninterrupted_one(done, run, disk, arrays, weights):
    parent = disk("size=32m")
    shutil.copytree(run, parent / "run")
    filler = fill(parent, 100_000)
    assert run_command(train.main, ["--run", str(parent / "run"), "--steps", "8"]) == 74
    filler.unlink()
    for folder in (parent / "run", run):
        call = ["--run", str(folder), "--steps", "8", "--export", str(folder.with_name("export"))]
        assert run_command(train.main, call) == 0
    assert arrays(parent / "run", 8) == arrays(run, 8)
    assert weights(parent / "export") == weights(run.with_name("export")) != {}


@pytest.mark.parametrize("inodes", [1, 2, 4])  # beyond the old output: none for the new folder, or none for its files
def test_export_to_a_full_disk_keeps_the_old_one(inodes, done, disk, snapshot):
    parent = disk(f"size=64m,nr_inodes={1 + 1 + len(list((done / 'out').iterdir())) + inodes - 1}")
    shutil.copytree(done / "out", parent / "out")
    before = snapshot(parent)
    code = run_command(train.main, ["--run", str(done / "run"), "--export-only", "--export", str(parent / "out")])
    assert code in (73, 74)
    assert snapshot(parent) == before


def test_export_that_does_not_fit_is_not_started(done, disk):
    parent = disk("size=4m")
    assert run_command(train.main, ["--run", str(done / "run"), "--export-only", "--export", str(parent / "out")]) == 73
    assert list(parent.iterdir()) == []


# --- Permissions. The processes run without root's capabilities.


def test_growth_without_permission(start, tmp_path, tli, unprivileged, snapshot):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    call = ["upscale", "--model", start / "base", "--no-proof", "--every", 1, "--output"]
    code, _, err = tli(*call, locked / "out", before=unprivileged)
    assert code == 73 and "Permission denied" in err and str(locked / "out") in err
    shutil.copytree(start / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").chmod(0)
    call[2] = tmp_path / "base"
    code, _, err = tli(*call, tmp_path / "out", before=unprivileged)
    assert code == 74 and "Permission denied" in err and str(tmp_path / "base" / "model.safetensors") in err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_export_without_permission(done, tmp_path, tli, unprivileged):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    call = ["train", "--run", done / "run", "--export-only", "--export", locked / "out"]
    code, _, err = tli(*call, before=unprivileged)
    assert code == 73 and "Permission denied" in err and list(locked.iterdir()) == []


def test_training_without_permission_to_save_exits(run, tli, unprivileged, snapshot):
    before = snapshot(run / "checkpoints")
    (run / "checkpoints").chmod(0o555)
    code, _, err = tli("train", "--run", run, "--steps", 8, before=unprivileged, timeout=60)
    (run / "checkpoints").chmod(0o755)
    assert code == 74 and "Permission denied" in err
    assert snapshot(run / "checkpoints") == before


@pytest.mark.long
def test_unreadable_checkpoint_is_not_treated_as_damaged(run, tli, unprivileged, snapshot):
    files = [file for file in (run / "checkpoints" / "4").rglob("*") if file.is_file()]
    before = snapshot(run)
    for file in files:
        file.chmod(0)
    code, _, err = tli("train", "--run", run, "--steps", 8, before=unprivileged)
    for file in files:
        file.chmod(0o644)
    assert code == 74 and "Permission denied" in err
    assert snapshot(run) == before
