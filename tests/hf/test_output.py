"""The output is complete or not there, and an older one stays until then, whenever and however the command stops."""

import functools
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import tli_jax
from tli_jax import upscale
from tli_jax.cli.frame import run_command
from tli_jax.errors import OutputError
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.headers import SINGLE
from tli_jax.hf.output import check_output, staged

CONFIG = tli_jax.LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
WIDE = tli_jax.LlamaConfig(
    vocab_size=1024,
    hidden_size=1024,
    intermediate_size=1024,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=128,
)


def make(folder: Path, config: tli_jax.LlamaConfig) -> None:
    rng = np.random.default_rng(0)
    # Only the shapes come from the API: its random numbers take seconds to compile.
    shapes = jax.eval_shape(functools.partial(tli_jax.init_params, config), jax.random.key(0))
    tli_jax.save_hf(folder, config, jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32) - 0.5, shapes))
    (folder / "LICENSE").write_text("be nice\n")


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything in a folder: name → bytes, link target, or None for a folder."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        content = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = content
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def work_folder(output: Path) -> Path:
    """Where an output is written until it is complete; its name differs from those of the user's folders."""
    digest = hashlib.sha256(b"tli_jax output " + output.name.encode()).hexdigest()[:16]
    return output.with_name(f".{output.name}.partial-{digest}")


def flags(base: Path, output: Path, *more: str) -> list[str]:
    return ["--model", str(base), "--output", str(output), "--no-proof", *more]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, and two models grown from it: ``old/out``, and ``new/out``, which the tests make again."""
    root = tmp_path_factory.mktemp("folders")
    make(root / "base", CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda number, handler: None)
        assert run_command(upscale.main, flags(root / "base", root / "old" / "out", "--method", "stack")) == 0
        assert run_command(upscale.main, flags(root / "base", root / "new" / "out")) == 0
    return root


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs the command in this process: exit code, and stderr without progress and warnings."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]

    def run(*arguments: str) -> tuple[int, str]:
        code = run_command(upscale.main, arguments)
        return code, only_errors(capsys.readouterr().err)

    yield run
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def only_errors(stderr: str) -> str:
    return "".join(line for line in stderr.splitlines(True) if " done in " not in line and "warning: " not in line)


def is_one_line(stderr: str) -> bool:
    return stderr.startswith("error: ") and stderr.count("\n") == 1 and "internal" not in stderr


# --- Where the output may be.


def test_an_output_that_is_there_needs_leave(folders: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(folders / "old", tmp_path, dirs_exist_ok=True)
    arguments = flags(folders / "base", tmp_path / "out")
    code, stderr = run(*arguments)
    assert code == 73 and is_one_line(stderr)
    assert f"{tmp_path / 'out'}: exists and is not empty" in stderr and "--overwrite" in stderr
    assert snapshot(tmp_path) == snapshot(folders / "old")
    assert run(*arguments, "--overwrite")[0] == 0
    assert snapshot(tmp_path) == snapshot(folders / "new")


@pytest.mark.parametrize("where", ["new/out", "a/b/out", "empty/out", "link/out"])
def test_missing_or_empty_output_is_created(where: str, folders: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "empty" / "out").mkdir(parents=True)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert run(*flags(folders / "base", tmp_path / where))[0] == 0
    assert snapshot((tmp_path / where).parent.resolve()) == snapshot(folders / "new")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / where).stat().st_mode & 0o777 == 0o777 & ~mask


def test_target_of_a_link_is_replaced(folders: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(folders / "old", tmp_path / "real")
    (tmp_path / "out").symlink_to("real/out")
    assert run(*flags(folders / "base", tmp_path / "out", "--overwrite"))[0] == 0
    assert str((tmp_path / "out").readlink()) == "real/out"
    assert snapshot(tmp_path / "real") == snapshot(folders / "new")


TAKEN = {
    "is a file": "file",
    "is not a model folder (no config.json)": "letters",
    "cannot be created (File exists: ": "file/out",
    "cannot be created (File name too long: ": "x" * 300,
}


@pytest.mark.parametrize("text", TAKEN)
def test_what_is_no_model_is_not_replaced(text: str, folders: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to my mother").write_text("mine")
    before = snapshot(tmp_path)
    code, stderr = run(*flags(folders / "base", tmp_path / TAKEN[text], "--overwrite"))
    assert code == 73 and is_one_line(stderr) and str(tmp_path / TAKEN[text]) in stderr and text in stderr
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("where", ["base", "link", "base/../base/", "base/out", "base/a/b", "link/out", ".", "..", "/"])
def test_output_and_model_do_not_lie_in_each_other(
    where: str, more: list[str], folders: Path, tmp_path: Path, run: Run
) -> None:
    shutil.copytree(folders / "base", tmp_path / "in" / "base")
    (tmp_path / "in" / "link").symlink_to("base")
    (tmp_path / "in" / "config.json").touch()
    before = snapshot(tmp_path)
    code, stderr = run(*flags(tmp_path / "in" / "base", tmp_path / "in" / where, *more))
    assert code == 2 and is_one_line(stderr) and str(tmp_path / "in" / "base") in stderr
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["a[1]", "x*", "**", "$(touch marker); echo 'ü'", "-n", "back\\slash"])
def test_names_are_taken_literally(name: str, folders: Path, tmp_path: Path, run: Run) -> None:
    other = work_folder(tmp_path / "xyz")
    for abandoned in (work_folder(tmp_path / name), other):
        shutil.copytree(folders / "old", abandoned)
    assert run(*flags(folders / "base", tmp_path / name))[0] == 0
    assert names(tmp_path) == sorted([name, other.name])


def test_folders_with_similar_names_are_left_alone(folders: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(folders / "old", tmp_path, dirs_exist_ok=True)
    for mine in (".out.partial-1", ".out.partial-0123456789abcdef", ".out.previous", ".out.lock"):
        shutil.copytree(folders / "old" / "out", tmp_path / mine)
    before = {name: found for name, found in snapshot(tmp_path).items() if name.startswith(".")}
    assert run(*flags(folders / "base", tmp_path / "out"))[0] == 73
    assert run(*flags(folders / "base", tmp_path / "out", "--overwrite"))[0] == 0
    found = snapshot(tmp_path)
    assert {name: found[name] for name in found if name.startswith(".")} == before
    assert {name: found[name] for name in found if not name.startswith(".")} == snapshot(folders / "new")


@pytest.mark.parametrize("where", ["loop", "loop/out"])
def test_circular_links(where: str, folders: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "loop").symlink_to("pool")
    (tmp_path / "pool").symlink_to("loop")
    code, stderr = run(*flags(folders / "base", tmp_path / where))
    assert code == 73 and is_one_line(stderr) and str(tmp_path / where) in stderr
    assert run("--model", str(tmp_path / where), "--output", str(tmp_path / "out"))[0] == 66
    assert names(tmp_path) == ["loop", "pool"]


def test_output_name_with_a_nul(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="null"), staged(tmp_path / "a\0b", 0):
        pass


# --- Two writers at once.


def test_second_writer_is_refused(tmp_path: Path) -> None:
    for overwrite in (False, True):
        with staged(tmp_path / "out", 0, overwrite) as folder:
            (folder / "config.json").write_text("first")
            with pytest.raises(OutputError, match="another process is writing it"):
                check_output(tmp_path / "out", None, overwrite)
            with pytest.raises(OutputError, match="another process is writing it"), staged(tmp_path / "out", 0, True):
                pass
            with staged(tmp_path / "other", 0, overwrite) as other:
                (other / "config.json").write_text("other")
        assert (tmp_path / "out" / "config.json").read_text() == "first"
    assert names(tmp_path) == ["other", "out"]


def test_output_that_is_created_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def write() -> None:
        with staged(tmp_path / "out", 0) as folder:
            (folder / "config.json").write_text("mine")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "config.json").write_text("theirs")

    with pytest.raises(OutputError, match="created by another process meanwhile"):
        write()
    with pytest.raises(OutputError, match="exists and is not empty"):  # as after an earlier check
        write()
    assert snapshot(tmp_path) == {"out": None, "out/config.json": b"theirs"}


def test_two_commands_at_once(folders: Path, tmp_path: Path) -> None:
    calls = [flags(folders / "base", tmp_path / "out", "--every", every) for every in ("1", "2")]
    start = [sys.executable, "-m", "tli_jax.upscale"]
    processes = [subprocess.Popen([*start, *call], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for call in calls]
    stderr = [process.communicate(timeout=120)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 73], stderr
    layers = {0: 8, 1: 6}[codes.index(0)]
    assert open_checkpoint(tmp_path / "out").config.num_hidden_layers == layers
    assert names(tmp_path) == ["out"]


# --- An old output that cannot be deleted.

AS_NOBODY = """
import os, sys
from pathlib import Path
from tli_jax.hf.output import check_output, staged
from tli_jax.errors import OutputError
os.setgid(65534), os.setuid(65534)
output, is_checked = Path(sys.argv[1]), sys.argv[2] == "checked"
for _ in range(2):
    try:
        if is_checked:
            check_output(output, None, True)
        with staged(output, 0, True) as folder:
            (folder / "config.json").write_text("new")
    except OutputError as error:
        print(error.exit_code)
    else:
        print(0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["the folder is root's", "a folder in it is root's", "a sticky folder holds it"])
def test_output_of_another_user_fails_every_time(what: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own are closed to others
        parent, output = Path(name), Path(name) / "out"
        (output / "deep").mkdir(parents=True)
        (output / "config.json").write_text("old")
        (output / "deep" / "file").write_text("old")
        parent.chmod(0o1777 if what.startswith("a sticky") else 0o777)
        output.chmod(0o755 if what.startswith("the folder") else 0o777)
        (output / "deep").chmod(0o755 if what.startswith("a folder") else 0o777)
        before = snapshot(parent)
        for how in ("checked", ""):
            call = [sys.executable, "-c", AS_NOBODY, str(output), how]
            done = subprocess.run(call, capture_output=True, text=True, timeout=60)
            assert done.stdout.split() == ["73", "73"], done.stderr
        assert snapshot(parent) == before


# --- Disks that are full, read-only or mounted.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system at ``disk`` with the given options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)


def test_small_disk_is_noticed_before_writing(disk, folders: Path, run: Run) -> None:
    parent = disk("size=8m")
    shutil.copytree(folders / "old", parent, dirs_exist_ok=True)
    code, stderr = run(*flags(folders / "base", parent / "out", "--overwrite"))
    assert code == 73 and is_one_line(stderr)
    assert str(parent / "out") in stderr and "are needed" in stderr and "are free" in stderr
    assert snapshot(parent) == snapshot(folders / "old")


def test_disk_that_fills_up_loses_nothing(disk, folders: Path, run: Run) -> None:
    # Enough bytes, but not enough inodes for another three files.
    parent = disk(f"size=64m,nr_inodes={2 + len(snapshot(folders / 'old')) + 2}")
    shutil.copytree(folders / "old", parent, dirs_exist_ok=True)
    code, stderr = run(*flags(folders / "base", parent / "out", "--overwrite"))
    assert code == 74 and is_one_line(stderr)
    assert f"{parent / 'out'}: writing failed (No space left on device)" in stderr and ": free some space" in stderr
    assert snapshot(parent) == snapshot(folders / "old")


@pytest.mark.parametrize("method", ["tli", "average"])  # copied by the kernel, and written from memory
def test_file_size_limit_loses_nothing(method: str, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "old", tmp_path, dirs_exist_ok=True)
    arguments = flags(folders / "base", tmp_path / "out", "--overwrite", "--method", method)
    limited = ["sh", "-c", 'ulimit -f 64; exec "$@"', "sh", sys.executable, "-m", "tli_jax.upscale", *arguments]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60)
    stderr = only_errors(done.stderr)
    assert done.returncode == 74 and is_one_line(stderr)
    assert f"{tmp_path / 'out'}: writing failed (File too large)" in stderr and "raise the limit on" in stderr
    assert snapshot(tmp_path) == snapshot(folders / "old")


def test_folder_without_write_permission(disk, folders: Path, tmp_path: Path, run: Run) -> None:
    if os.geteuid() == 0:  # permissions do not stop root
        parent, text = disk("size=64m"), "Read-only file system"
        subprocess.run(["mount", "-o", "remount,ro", parent], check=True)
    else:
        parent, text = tmp_path / "locked", "Permission denied"
        parent.mkdir(mode=0o555)
    code, stderr = run(*flags(folders / "base", parent / "out"))
    assert code == 73 and is_one_line(stderr) and f"{parent / 'out'}: cannot be created ({text}: " in stderr


def test_mount_point_cannot_be_replaced(disk, folders: Path, run: Run) -> None:
    parent = disk("size=64m")
    code, stderr = run(*flags(folders / "base", parent))
    assert code == 73 and is_one_line(stderr) and f"{parent}: is a mount point" in stderr
    assert run(*flags(folders / "base", parent / "out"))[0] == 0


# --- Stopped at any moment. A process with everything imported forks one command after another. An audit hook counts
# --- the operations on files below the output's parent, and strikes at the given one.

SERVER = """
import errno, json, os, signal, sys
from tli_jax import upscale
from tli_jax.cli.frame import run_command

TOUCHES = {"open", "os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "shutil.copyfile"}

def strike(what, at, parent):
    count = 0
    def hook(event, arguments):
        nonlocal count
        # Removal with a descriptor of the folder gives names without the folder.
        if event in TOUCHES and (event in ("os.remove", "os.rmdir") or str(arguments[0]).startswith(parent)):
            count += 1
            if count == at:
                os.write(2, f"struck: {event} {arguments}\\n".encode())
                if what == "full":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), arguments[0])
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGTERM}[what])
    sys.addaudithook(hook)

for line in sys.stdin:
    arguments, what, at, parent, stderr = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        strike(what, at, parent)
        os._exit(run_command(upscale.main, arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

Strike = Callable[..., tuple[int, str, bool]]


@pytest.fixture(scope="session")
def server() -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def strike(server: subprocess.Popen[str], folders: Path, tmp_path: Path) -> Strike:
    """Runs the command to ``outputs/out`` and strikes: exit code, errors, and whether the moment was reached."""
    (tmp_path / "outputs").mkdir()

    def strike(what: str, at: int) -> tuple[int, str, bool]:
        assert server.stdin is not None and server.stdout is not None
        arguments = flags(folders / "base", tmp_path / "outputs" / "out", "--overwrite")
        call = (arguments, what, at, str(tmp_path / "outputs"), str(tmp_path / "stderr"))
        print(json.dumps(call), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        stderr = (tmp_path / "stderr").read_text().splitlines(True)
        errors = "".join(line for line in stderr if not line.startswith("struck: "))
        return code, only_errors(errors), any(line.startswith("struck: ") for line in stderr)

    return strike


@pytest.mark.parametrize("before", ["nothing", "old"])
@pytest.mark.parametrize("what", ["kill", "stop", "full"])
def test_at_no_moment_is_anything_lost(what: str, before: str, folders: Path, tmp_path: Path, strike: Strike) -> None:
    outputs, new = tmp_path / "outputs", snapshot(folders / "new")
    for at in itertools.count(1):
        shutil.rmtree(outputs)
        outputs.mkdir() if before == "nothing" else shutil.copytree(folders / "old", outputs)
        complete = (snapshot(outputs), new)
        code, stderr, is_reached = strike(what, at)
        if not is_reached:
            break
        found = snapshot(outputs)
        if what == "kill":
            assert code == -signal.SIGKILL
            # Between the two renames, the old output is in the work folder.
            visible = {name: content for name, content in found.items() if not name.startswith(".out.")}
            at_old = f"{work_folder(outputs / 'out').name}/old"
            aside = {k.replace(at_old, "out"): v for k, v in found.items() if k.startswith(at_old)}
            assert visible in complete or (not visible and aside == complete[0])
        else:
            # Once the new output is in place, parts of the old one may be left to delete.
            is_replaced = {name: content for name, content in found.items() if name.startswith("out")} == new
            assert is_replaced or found == complete[0]
            if what == "stop":
                assert code == 75 and stderr == "error: stopped by SIGTERM: run the same command again\n"
            else:
                assert (code in (73, 74) and is_one_line(stderr) and str(outputs) in stderr) or (
                    code == 0 and is_replaced
                )
        if found not in complete:
            assert strike("kill", 0)[0] == 0
            assert snapshot(outputs) == new
    assert code == 0 and snapshot(outputs) == new
    assert at > 15


@pytest.mark.parametrize("is_overwritten", [False, True])
@pytest.mark.parametrize("meanwhile", ["nothing", "an empty folder", "the new one"])
def test_interrupted_replacement_is_recovered(
    meanwhile: str, is_overwritten: bool, folders: Path, tmp_path: Path, run: Run
) -> None:
    work = work_folder(tmp_path / "out")
    shutil.copytree(folders / "old" / "out", work / "old")
    shutil.copytree(folders / "new" / "out", work / "new-1")
    if meanwhile == "an empty folder":
        (tmp_path / "out").mkdir()
    elif meanwhile == "the new one":
        (work / "new-1").rename(tmp_path / "out")
    code, _ = run(*flags(folders / "base", tmp_path / "out", *["--overwrite"] * is_overwritten))
    assert code == (0 if is_overwritten else 73)
    if is_overwritten or meanwhile == "the new one":
        assert snapshot(tmp_path) == snapshot(folders / "new")
    else:
        assert snapshot(tmp_path) == snapshot(folders / "old")


def test_lock_ends_with_its_process(folders: Path, tmp_path: Path, run: Run) -> None:
    locker = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(); input()"
    work = work_folder(tmp_path / "out")
    work.mkdir()
    call, pipe = [sys.executable, "-c", locker, work], subprocess.PIPE
    with subprocess.Popen(call, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        code, stderr = run(*flags(folders / "base", tmp_path / "out", "--overwrite"))
        assert code == 73 and is_one_line(stderr) and "another process is writing it" in stderr
        assert names(tmp_path) == [work.name]
        other.kill()
    assert run(*flags(folders / "base", tmp_path / "out"))[0] == 0
    assert names(tmp_path) == ["out"]


# --- Large models.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, folders: Path) -> Iterator[Path]:
    """``thin``, 1 layer and 37 MB, and ``thick``, 8 layers and 239 MB."""
    root = tmp_path_factory.mktemp("large")
    make(root / "thin", WIDE)
    params = tli_jax.load_hf(root / "thin")[1]
    tli_jax.save_hf(root / "thick", WIDE, tli_jax.inject(params, tli_jax.stack(1, 8)))
    yield root
    shutil.rmtree(root)


# Runs the command, then prints the peak memory of the process in MiB.
MEASURE = """
import sys
from tli_jax import upscale
from tli_jax.cli.frame import run_command
code = run_command(upscale.main, sys.argv[1:])
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(code)
"""


def test_memory_does_not_grow_with_the_model(large: Path, tmp_path: Path) -> None:
    peaks = []
    for name in ("thin", "thick"):
        arguments = flags(large / name, tmp_path / "out", "--every", "1", "--overwrite")
        done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stderr.splitlines()[-1]))
    shutil.rmtree(tmp_path / "out")
    assert max(peaks) < 400 and peaks[1] - peaks[0] < 40


def test_killed_and_stopped_while_weights_are_written(large: Path, tmp_path: Path) -> None:
    call = [sys.executable, "-m", "tli_jax.upscale", *flags(large / "thick", tmp_path / "out", "--every", "2")]
    size = (large / "thick" / SINGLE).stat().st_size
    for share, number in ((0.0, signal.SIGKILL), (0.5, signal.SIGTERM), (0.9, signal.SIGKILL)):
        with subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                if any(file.stat().st_size > share * size for file in tmp_path.glob(f".out.partial-*/new-*/{SINGLE}")):
                    process.send_signal(number)
                    break
                time.sleep(0.0005)
            _, stderr = process.communicate(timeout=30)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 75}[number]
        assert not (tmp_path / "out").exists()
        if number == signal.SIGTERM:
            assert only_errors(stderr) == "error: stopped by SIGTERM: run the same command again\n"
            assert names(tmp_path) == []
    subprocess.run(call, check=True, capture_output=True, timeout=60)
    assert names(tmp_path) == ["out"]
    assert open_checkpoint(tmp_path / "out").config.num_hidden_layers == 12
    shutil.rmtree(tmp_path / "out")
