"""Checkpoints of a training run: bit-identical, complete or absent, and never silently wrong."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tli_jax.errors import DataError, OutputError, StorageError, UsageError
from tli_jax.training.checkpoints import Checkpoints
from tli_jax.training.digest import _program, digests
from tli_jax.training.failures import DamagedError, on_all_processes, system_error

RunScript = Callable[..., subprocess.Popen[str]]


class Moments(NamedTuple):
    mu: Any
    nu: Any
    count: Any


def make_mesh(*shape: int, kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(kind,) * 2)


def place(mesh: Mesh, array: Any, *spec: str | None) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def make_state(mesh: Mesh, seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    weight = draw.normal(size=(128, 64)).astype(np.float32)  # shards large enough for a file of their own
    weight[0, :2] = np.nan, -0.0
    return {
        "params": {
            "layers": {"mlp.up_proj.weight": place(mesh, weight, "fsdp", "tensor")},
            "norm": place(mesh, draw.normal(size=16).astype(ml_dtypes.bfloat16), "fsdp"),
        },
        "moments": Moments(
            place(mesh, draw.normal(size=(8, 4, 2)).astype(np.float16), "fsdp", None, "tensor"),
            {},
            place(mesh, np.int32(seed)),
        ),
        "mask": [place(mesh, draw.random(8) < 0.5), place(mesh, draw.integers(-9, 9, 8, np.int8)), None],
        "nothing": place(mesh, np.zeros((0, 8), np.float32), None, "tensor"),
        "key": place(mesh, draw.integers(0, 2**32, 2, np.uint32)),
    }


def abstract(state: Any, mesh: Mesh) -> Any:
    """Return the shapes of a state, with other shardings if its first dimension is divisible."""

    def leaf(array: jax.Array) -> jax.ShapeDtypeStruct:
        is_divisible = array.ndim and array.shape[0] and array.shape[0] % mesh.shape["tensor"] == 0
        return jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=NamedSharding(mesh, P("tensor") if is_divisible else P())
        )

    return jax.tree.map(leaf, state)


def raw(state: Any) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(4, 2)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield checkpoints
    checkpoints.close()


def refuse(line: str) -> None:
    raise AssertionError(f"set aside: {line}")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_round_trip_on_another_mesh(checkpoints: Checkpoints, kind: AxisType):
    state = make_state(make_mesh(4, 2, kind=kind))
    meta = {"position": {"source": [1, 2], "share": 0.1}, "text": "한"}
    assert checkpoints.restore_newest(abstract(state, make_mesh(2, 4)), refuse) is None
    assert checkpoints.save(7, state, meta)
    checkpoints.finish()
    wanted = abstract(state, make_mesh(2, 4, kind=kind))
    found = checkpoints.restore_newest(wanted, refuse)
    assert found is not None
    step, restored, found_meta = found
    assert (step, found_meta) == (7, meta)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert raw(restored) == raw(state)
    assert jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, wanted))
    assert not checkpoints.save(7, state, {"position": "another"})
    found = checkpoints.restore_newest(wanted, refuse)
    assert found is not None and found[2] == meta


def test_arrays_may_be_donated_at_once(checkpoints: Checkpoints, mesh: Mesh):
    update = jax.jit(lambda array: array * 1.5 + 1, donate_argnums=0)
    array = place(mesh, np.random.default_rng(0).normal(size=(4096, 1024)).astype(np.float32), "fsdp")
    before = np.array(array)
    checkpoints.save(1, {"a": array}, {})
    for _ in range(5):
        array = update(array)
    jax.block_until_ready(array)
    checkpoints.finish()
    found = checkpoints.restore_newest(abstract({"a": array}, mesh), refuse)
    assert found is not None and np.array_equal(np.asarray(found[1]["a"]), before)


def test_keeps_the_newest_and_the_frozen(checkpoints: Checkpoints, mesh: Mesh, tmp_path: Path):
    frozen = {"a": place(mesh, np.arange(8.0))}
    checkpoints.save_frozen(frozen)
    for step in range(5):
        checkpoints.save(step, make_state(mesh, step), {})
        assert len(checkpoints.steps()) <= 3
    checkpoints.finish()
    assert checkpoints.steps() == [3, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4", "frozen"]
    assert raw(checkpoints.restore_frozen(abstract(frozen, mesh))) == raw(frozen)


def test_any_damage_to_any_file_is_detected(tmp_path: Path, mesh: Mesh):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    states = {1: make_state(mesh, 1), 2: make_state(mesh, 2)}
    checkpoints = Checkpoints(whole, keep=2)
    for step, state in states.items():
        checkpoints.save(step, state, {"step": step})
    checkpoints.close()
    files = sorted(path.relative_to(whole) for path in (whole / "2").rglob("*") if path.is_file())
    draw = random.Random(0)
    reports: list[str] = []
    outcomes, whys = set(), set()
    shutil.copytree(whole, folder)
    checkpoints = Checkpoints(folder, keep=2)
    wanted = abstract(states[1], mesh)
    for file in files:
        size = (whole / file).stat().st_size
        for damage in ["flip", "cut", "delete"]:
            shutil.rmtree(folder / "2", ignore_errors=True)
            shutil.copytree(whole / "2", folder / "2")
            reports.clear()
            if damage == "delete":
                (folder / file).unlink()
            elif damage == "flip":
                content = bytearray((whole / file).read_bytes())
                content[draw.randrange(size)] ^= 1 << draw.randrange(8)
                (folder / file).write_bytes(content)
            else:
                os.truncate(folder / file, size // 2)
            found = checkpoints.restore_newest(wanted, reports.append)
            assert found is not None
            step, state, meta = found
            assert raw(state) == raw(states[step]), (file, damage)
            assert meta == {"step": step}
            assert [str(folder / "2") in line and "\n" not in line for line in reports] == [True] * (2 - step)
            assert checkpoints.steps() == ([1, 2] if step == 2 else [1])
            outcomes.add((file.parts[1], damage, step))
            whys |= {re.sub(r".*run/2: (\S+).*", r"\1", line) for line in reports}
    assert {("meta", "flip", 1), ("state", "flip", 1), ("state", "cut", 1), ("state", "delete", 1)} <= outcomes
    shutil.rmtree(folder / "2", ignore_errors=True)
    assert {"meta/meta.json:", "state:", "params.layers.mlp.up_proj.weight"} <= whys
    # The step can be saved again, which deletes the damaged one.
    assert (folder / "2.damaged").exists()
    checkpoints.save(2, states[2], {"step": 2})
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    found = checkpoints.restore_newest(wanted, refuse)
    assert found is not None and raw(found[1]) == raw(states[2])


def test_read_only_changes_nothing(checkpoints: Checkpoints, mesh: Mesh, tmp_path: Path):
    state = {"a": place(mesh, np.ones(8, np.float32))}
    for step in (1, 2):
        checkpoints.save(step, state, {})
    checkpoints.finish()
    folder = tmp_path / "checkpoints"
    (folder / "2" / "meta" / "meta.json").unlink()
    (folder / "3.orbax-checkpoint-tmp").mkdir()  # another process is writing it
    reader = Checkpoints(folder, keep=1, read_only=True)
    found = reader.restore_newest(state, lambda _: None)
    assert found is not None and found[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        reader.save(4, state, {})
    reader.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3.orbax-checkpoint-tmp"]
    Checkpoints(tmp_path / "none", keep=1, read_only=True).close()
    assert not (tmp_path / "none").exists()


def test_only_damaged_steps_are_an_error(checkpoints: Checkpoints, mesh: Mesh, tmp_path: Path):
    state = make_state(mesh)
    for step in (1, 2):
        checkpoints.save(step, state, {})
    checkpoints.finish()
    for file in (tmp_path / "checkpoints").glob("*/meta/meta.json"):
        file.write_bytes(file.read_bytes().replace(b'"shape"', b'"shale"', 1))
    for _ in range(2):
        reports: list[str] = []
        with pytest.raises(
            DataError, match=r"checkpoints/1: meta/meta.json: .*does not match its digest.*no other step"
        ):
            checkpoints.restore_newest(abstract(state, mesh), reports.append)
        assert len(reports) == 2
    assert checkpoints.steps() == [1, 2]


def test_another_model_is_refused(checkpoints: Checkpoints, mesh: Mesh):
    checkpoints.save(3, {"a": {"b": place(mesh, np.zeros((8, 4), np.float32))}, "c": place(mesh, np.zeros(2))}, {})
    wanted = {"a": {"b": place(mesh, np.zeros((4, 8), np.float32))}, "c": place(mesh, np.zeros(2))}
    with pytest.raises(DataError, match=r"/3: a.b is float32 \[8, 4\] in the checkpoint and float32 \[4, 8\] in this"):
        checkpoints.restore_newest(wanted, refuse)
    with pytest.raises(DataError, match=r"d \(with 1 more\) is absent in the checkpoint and float32 \[2\] in this"):
        checkpoints.restore_newest({"d": wanted["c"], "a": {"b": place(mesh, np.zeros((8, 4), np.float32))}}, refuse)
    assert checkpoints.steps() == [3]
    with pytest.raises(ValueError, match="one path"):
        checkpoints.save(4, {"a": {"b": wanted["c"]}, "a.b": wanted["c"]}, {})


def test_frozen_is_written_once(checkpoints: Checkpoints, mesh: Mesh, tmp_path: Path):
    frozen = {
        "q": place(mesh, np.arange(8192, dtype=np.float32), "fsdp"),
        "k": place(mesh, np.ones(8, ml_dtypes.bfloat16)),
    }
    other = make_mesh(8, 1)
    assert checkpoints.restore_frozen(abstract(frozen, other)) is None
    checkpoints.save_frozen(frozen)
    folder = tmp_path / "checkpoints" / "frozen"
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    checkpoints.save_frozen(frozen)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    assert raw(checkpoints.restore_frozen(abstract(frozen, other))) == raw(frozen)
    with pytest.raises(DataError, match="frozen: q differs from the start of this run"):
        checkpoints.save_frozen(frozen | {"q": frozen["q"] + 1})
    assert checkpoints.steps() == []
    assert checkpoints.restore_frozen({}) == {}  # nothing is frozen
    data = [
        file for file in folder.rglob("d/*") if np.arange(8192, dtype=np.float32).tobytes()[8:16] in file.read_bytes()
    ]
    assert data
    for file in data:
        content = bytearray(file.read_bytes())
        content[content.index(np.arange(8192, dtype=np.float32).tobytes()[8:16])] ^= 1
        file.write_bytes(content)
    with pytest.raises(DataError, match="frozen: q does not match its digest"):
        checkpoints.restore_frozen(abstract(frozen, other))
    (folder / "meta" / "meta.json").unlink()
    with pytest.raises(DataError, match=r"frozen: meta/meta\.json: .*No such file"):
        checkpoints.restore_frozen(abstract(frozen, other))


SCRIPT = """
import os, sys
import jax, numpy as np
if len(sys.argv) > 4:
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", int(sys.argv[4]), int(sys.argv[2]))
from jax.sharding import NamedSharding, PartitionSpec as P
from tli_jax.training.checkpoints import Checkpoints
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
def put(array):
    return jax.device_put(array, NamedSharding(mesh, P("fsdp")))
abstract = {"a": jax.ShapeDtypeStruct((64, 512), np.float32, sharding=NamedSharding(mesh, P("fsdp")))}
"""


@pytest.fixture(scope="module")
def run_script(compiled: dict[str, str]) -> RunScript:
    """Starts a script in a folder; or one of several processes, with its index, a port and their number."""

    def start(source: str, *arguments: str, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
        # The script sets the number of devices of several processes, which must not share compiled programs.
        variables = compiled if len(arguments) < 4 else {"XLA_FLAGS": ""}
        return subprocess.Popen(
            [*prefix, sys.executable, "-c", SCRIPT + textwrap.dedent(source), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | variables,
        )

    return start


def test_kill_at_any_moment(tmp_path: Path, mesh: Mesh, run_script: RunScript):
    script = """
        checkpoints = Checkpoints(sys.argv[1], keep=2)
        assert not [name for name in os.listdir(sys.argv[1]) if not name.isdecimal() and name != "frozen"]
        frozen = put(np.arange(2**20, dtype=np.float32))
        checkpoints.save_frozen({"a": frozen})
        found = checkpoints.restore_newest(abstract, print)
        step = 0 if found is None else found[0]
        assert found is None or np.array_equal(found[1]["a"], np.full((64, 512), step))
        print("ready", flush=True)
        while True:
            step += 1
            checkpoints.save(step, {"a": put(np.full((64, 512), step, np.float32))}, {"step": step})
    """

    def numbers() -> list[int]:
        return [int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()]

    draw = random.Random(0)
    newest = 0
    for _ in range(3):
        with run_script(script, str(tmp_path)) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
            while max(numbers(), default=0) <= newest:  # no timeout, since the machine may be busy
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
            assert process.communicate() == ("", "")
        assert max(numbers()) > newest
        newest = max(numbers())
    checkpoints = Checkpoints(tmp_path, keep=2)
    like = {"a": jax.ShapeDtypeStruct((64, 512), np.float32, sharding=NamedSharding(mesh, P()))}
    found = checkpoints.restore_newest(like, refuse)
    assert found is not None
    step, state, meta = found
    assert step == newest and meta == {"step": step}
    assert np.array_equal(np.asarray(state["a"]), np.full((64, 512), step))
    checkpoints.close()


def test_kill_while_frozen_is_written(tmp_path: Path, mesh: Mesh, run_script: RunScript):
    script = """
        frozen = {"a": put(np.ones(2**24, np.float32))}
        checkpoints = Checkpoints(sys.argv[1], keep=2)
        print("ready", flush=True)
        checkpoints.save_frozen(frozen)
    """
    with run_script(script, str(tmp_path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while not any(tmp_path.iterdir()):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert [path.suffix for path in tmp_path.iterdir()] == [".orbax-checkpoint-tmp"]
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "3.removed").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert not list(tmp_path.iterdir())
    frozen = {"a": place(mesh, np.ones(8, np.float32))}
    assert checkpoints.restore_frozen(frozen) is None
    checkpoints.save_frozen(frozen)
    assert raw(checkpoints.restore_frozen(frozen)) == raw(frozen)
    checkpoints.close()


def test_only_the_report_is_printed(tmp_path: Path, mesh: Mesh, run_script: RunScript):
    """Orbax by itself writes pages of tracebacks to stderr."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, {"a": place(mesh, np.full((64, 512), step, np.float32), "fsdp")}, {})
    checkpoints.close()
    for file in (tmp_path / "2" / "state").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    script = """
        checkpoints = Checkpoints(sys.argv[1], keep=2)
        step, state, meta = checkpoints.restore_newest(abstract, print)
        assert step == 1 and (np.asarray(state["a"]) == 1).all()
        checkpoints.close()
        import gc; gc.collect()
    """
    with run_script(script, str(tmp_path)) as process:
        out, err = process.communicate()
    assert not err
    assert re.fullmatch(rf"{tmp_path}/2: state: .*: set aside, resuming from the previous checkpoint\n", out)


@pytest.mark.parametrize("way", ["tmpfs", "limit"])
def test_disk_full(tmp_path: Path, way: str, run_script: RunScript):
    folder = tmp_path / "disk"
    folder.mkdir()
    script = """
        import resource, signal, time
        from tli_jax.errors import StorageError
        checkpoints = Checkpoints(sys.argv[1], keep=2)
        checkpoints.save(1, {"a": put(np.ones((64, 512), np.float32))}, {})
        checkpoints.finish()
        if sys.argv[2] == "limit":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        big = put(np.random.default_rng(0).normal(size=(2048, 1024)).astype(np.float32))
        checkpoints.save(2, {"a": big}, {})
        start = time.monotonic()
        try:
            while time.monotonic() < start + 10:
                checkpoints.check()
                time.sleep(0.01)
        except StorageError as error:
            print(error.exit_code, error)
        checkpoints.check()
        checkpoints.close()
        assert sorted(os.listdir(sys.argv[1])) == ["1"], os.listdir(sys.argv[1])
        step, state, meta = checkpoints.restore_newest(abstract, print)
        assert step == 1 and np.array_equal(state["a"], np.ones((64, 512)))
        print(f"took {time.monotonic() - start:.1f}")
    """
    if (
        way == "tmpfs"
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tli_jax_test", str(folder)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("only root may mount")
    try:
        with run_script(script, str(folder), way) as process:
            out, err = process.communicate()
    finally:
        if way == "tmpfs":
            subprocess.run(["umount", str(folder)], check=True)
    assert not err
    message, took = out.splitlines()
    assert message.startswith(f"74 {folder}: writing a checkpoint failed")
    assert ("No space left" if way == "tmpfs" else "File too large") in message
    assert float(took.removeprefix("took ")) < 5


def test_no_permission(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/checkpoints: cannot be used"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1)
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    (tmp_path / "run").rmdir()
    with pytest.raises(StorageError, match="reading a checkpoint failed"):
        checkpoints.steps()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_run(folder: Path, mesh: Mesh, run: dict[str, str], *steps: int, keep: int = 9) -> None:
    """Save steps, each filled with its number, and frozen parameters."""
    checkpoints = Checkpoints(folder, keep, run)
    checkpoints.save_frozen({"f": place(mesh, np.ones(8, np.float32))})
    for step in steps:
        checkpoints.save(step, {"a": place(mesh, np.full(8, step, np.float32))}, {"step": step})
    checkpoints.close()


def test_checkpoints_of_another_run_are_set_aside(tmp_path: Path, mesh: Mesh):
    mine, other = {"id": "mine", "data": "1"}, {"id": "other", "data": "1"}
    save_run(tmp_path / "mine", mesh, mine, 2, 4, 6)
    save_run(tmp_path / "other", mesh, other, 4, 6)
    for step in ("4", "6"):
        shutil.rmtree(tmp_path / "mine" / step)
        shutil.copytree(tmp_path / "other" / step, tmp_path / "mine" / step)
    (tmp_path / "mine" / "6.foreign").mkdir()  # belongs to somebody else
    wanted = {"a": place(mesh, np.ones(8, np.float32))}
    before = names(tmp_path / "mine")
    reader, reports = Checkpoints(tmp_path / "mine", 1, mine, read_only=True), []
    found = reader.restore_newest(wanted, reports.append)
    assert found is not None and found[0] == 2 and names(tmp_path / "mine") == before
    assert found[2] == {"step": 2}
    checkpoints = Checkpoints(tmp_path / "mine", 1, mine)
    found = checkpoints.restore_newest(wanted, reports.append)
    assert found is not None and found[0] == 2 and (np.asarray(found[1]["a"]) == 2).all()
    why = "belongs to another run (id other): set aside, resuming from the previous checkpoint"
    assert reports[2:] == reports[:2] == [f"{tmp_path}/mine/{step}: {why}" for step in (6, 4)]
    checkpoints.save(8, wanted, {})
    checkpoints.close()
    assert names(tmp_path / "mine") == ["4.foreign", "6.foreign", "6.foreign-2", "8", "frozen"]


def test_only_checkpoints_of_another_run_are_refused(tmp_path: Path, mesh: Mesh):
    save_run(tmp_path, mesh, {"id": "other"}, 4)
    checkpoints = Checkpoints(tmp_path, 1, {"id": "mine"})
    wanted = {"a": place(mesh, np.ones(8, np.float32))}
    with pytest.raises(UsageError, match=r"/4: belongs to another run \(id other\); no other step is of this run"):
        checkpoints.restore_newest(wanted, lambda _: None)
    frozen = {"f": place(mesh, np.ones(8, np.float32))}
    for refused in (checkpoints.restore_frozen, checkpoints.save_frozen):
        with pytest.raises(UsageError, match="frozen: belongs to another run"):
            refused(frozen)
    assert names(tmp_path) == ["4", "frozen"]


def test_a_run_whose_digests_changed_is_refused(tmp_path: Path, mesh: Mesh):
    save_run(tmp_path, mesh, {"id": "mine", "data": "1", "plan": "1"}, 2, 4)
    checkpoints = Checkpoints(tmp_path, 1, {"id": "mine", "data": "2", "plan": "1"})
    with pytest.raises(
        UsageError, match="/4: the data of this run changed after this checkpoint was saved: restore a copy"
    ):
        checkpoints.restore_newest({"a": place(mesh, np.ones(8, np.float32))}, refuse)
    assert names(tmp_path) == ["2", "4", "frozen"]


def test_a_step_under_another_number_is_damaged(tmp_path: Path, mesh: Mesh):
    save_run(tmp_path, mesh, {"id": "mine"}, 2, 4)
    shutil.copytree(tmp_path / "2", tmp_path / "6")
    for name in ("08", "٣", "1" * 30):  # not step numbers
        (tmp_path / name).mkdir()
    checkpoints, reports = Checkpoints(tmp_path, 9, {"id": "mine"}), []
    found = checkpoints.restore_newest({"a": place(mesh, np.ones(8, np.float32))}, reports.append)
    assert found is not None and found[0] == 4 and checkpoints.steps() == [2, 4]
    assert reports == [f"{tmp_path}/6: is a copy of 2: set aside, resuming from the previous checkpoint"]


@pytest.mark.parametrize("file", ["meta/meta.json", "state/manifest.ocdbt"])
def test_a_fifo_does_not_hang(tmp_path: Path, mesh: Mesh, file: str):
    save_run(tmp_path, mesh, {}, 2, 4)
    (tmp_path / "4" / file).unlink()
    os.mkfifo(tmp_path / "4" / file)
    found = Checkpoints(tmp_path, 9).restore_newest({"a": place(mesh, np.ones(8, np.float32))}, lambda _: None)
    assert found is not None and found[0] == 2


# Drop the capabilities that let root read everything.
PLAIN = "--bounding-set=-dac_override,-dac_read_search,-fowner,-chown"
PLAIN_USER = ["setpriv", PLAIN, PLAIN.replace("bounding-set", "inh-caps")]


def test_a_read_error_is_not_damage(tmp_path: Path, mesh: Mesh, run_script: RunScript):
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root can read everything, and setpriv is missing")
    save_run(tmp_path / "run", mesh, {}, 2, 4)
    script = """
        from pathlib import Path
        from tli_jax.errors import StorageError
        folder = Path(sys.argv[1])
        checkpoints = Checkpoints(folder, keep=2)
        wanted = {"a": jax.ShapeDtypeStruct((8,), np.float32, sharding=NamedSharding(mesh, P("fsdp")))}
        def restore():
            return checkpoints.restore_newest(wanted, print)[0], checkpoints.restore_frozen({"f": wanted["a"]}) is None
        parts = [folder, *(p for name in ("4", "frozen") for p in [folder / name, *(folder / name).rglob("*")])]
        before = sorted(folder.rglob("*"))
        # Orbax does not read these.
        for path in [path for path in parts if path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")]:
            for mode in (0, 0o444) if path.is_dir() else (0,):  # without x, only names can be read
                path.chmod(mode)
                try:
                    print("restored", path, mode, restore())
                except StorageError as error:
                    assert "Permission denied" in str(error), error
                finally:
                    path.chmod(0o755)
        assert sorted(folder.rglob("*")) == before
        print(len(parts), restore())
    """
    with run_script(script, str(tmp_path / "run"), prefix=PLAIN_USER if os.geteuid() == 0 else []) as process:
        out, err = process.communicate(timeout=60)
    assert not err and process.returncode == 0
    count, rest = out.split(maxsplit=1)
    assert int(count) > 20 and rest == "(4, False)\n"


def test_errors_of_the_system():
    import errno

    def wrapped(inner: Exception) -> Exception:
        try:
            try:
                raise inner
            except Exception as error:
                raise ValueError("cannot read") from error
        except ValueError as error:
            return error

    tensorstore = ValueError("PERMISSION_DENIED: Error opening [source locations='x'] [os_error_code='13']")
    for error in (OSError(errno.EIO, "x"), PermissionError(errno.EACCES, "x"), MemoryError(), tensorstore):
        assert system_error(error) and system_error(wrapped(error)) == system_error(error)
        assert system_error(ExceptionGroup("several", [ValueError("x"), error])) == system_error(error)
        with pytest.raises(StorageError, match=r"file: .*nothing was changed"):
            on_all_processes("file", lambda error=error: (_ for _ in ()).throw(error))
    assert system_error(tensorstore) == "Permission denied"
    assert "RESOURCE_EXHAUSTED" in (system_error(RuntimeError("RESOURCE_EXHAUSTED: Out of memory")) or "")
    missing = ValueError("NOT_FOUND [os_error_code='2']")
    for error in (FileNotFoundError(errno.ENOENT, "x"), missing, ValueError("x"), json.JSONDecodeError("x", "y", 0)):
        assert system_error(error) is None
        with pytest.raises(DamagedError):
            on_all_processes("file", lambda error=error: (_ for _ in ()).throw(error))


@pytest.mark.parametrize("what", ["inodes", "bytes", "read only"])
def test_save_fails_at_every_point(tmp_path: Path, what: str, run_script: RunScript):
    """Allow one more file, or 16 KiB more, at a time, until the save succeeds."""
    script = """
        import subprocess, time
        from tli_jax.errors import StorageError
        folder, what = sys.argv[1:3]
        def remount(option):
            subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)
        values = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
        checkpoints = Checkpoints(folder, keep=2)
        checkpoints.save(1, {"a": put(values)}, {})
        checkpoints.close()
        stats = os.statvfs(folder)
        files, size = stats.f_files - stats.f_ffree, (stats.f_blocks - stats.f_bfree) * stats.f_frsize
        slowest, failures = 0, 0
        for more in range(100):
            if what == "inodes":
                remount(f"nr_inodes={files + more}")
            elif what == "bytes":
                remount(f"size={size + (more + 1) * 16384}")
            else:
                remount("ro" if more == 0 else "rw")
            start = time.monotonic()
            try:
                checkpoints = Checkpoints(folder, keep=2)
                checkpoints.save(2, {"a": put(values)}, {})
                checkpoints.finish()
                break
            except StorageError as error:
                assert str(error).startswith(f"{folder}: writing a checkpoint failed ("), error
                assert checkpoints.steps() == [1]
                failures += 1
            slowest = max(slowest, time.monotonic() - start)
        assert checkpoints.restore_newest(abstract, print)[0] == 2
        print(failures, slowest, flush=True)
    """
    options = "size=64m,nr_inodes=100k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tli_jax_test", str(tmp_path)], check=False)
    if done.returncode:
        pytest.skip("only root may mount")
    try:
        with run_script(script, str(tmp_path), what) as process:
            out, err = process.communicate(timeout=120)  # a thread left behind would take longer
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert not err and process.returncode == 0
    failures, slowest = map(float, out.split())
    assert failures >= {"inodes": 10, "bytes": 5, "read only": 1}[what]
    assert slowest < 10


@pytest.mark.all_cores
def test_two_processes(tmp_path: Path, run_script: RunScript):
    """Saved by two processes, damaged for the second only, restored by two and by one."""
    script = """
        index, count = int(sys.argv[2]), int(sys.argv[4])
        if index == 1:
            from tli_jax.training import checkpoint_reader as state
            sha256 = state._sha256
            def fail(content):
                if content["meta"] == {"step": 2}:
                    raise ValueError("garbage")
                return sha256(content)
        checkpoints = Checkpoints(sys.argv[1], keep=2)
        frozen = {"a": put(np.arange(4096, dtype=np.float32))}
        assert checkpoints.restore_frozen(frozen) is None
        checkpoints.save_frozen(frozen)
        checkpoints.save_frozen(frozen)
        reports = []  # written to a file, because Gloo's threads print to stdout
        assert checkpoints.restore_newest(abstract, reports.append) is None
        for step in range(3):
            checkpoints.save(step, {"a": put(np.full((64, 512), step, np.float32))}, {"step": step})
        checkpoints.finish()
        assert not checkpoints.save(2, {"a": put(np.zeros((64, 512), np.float32))}, {})
        if index == 1:
            state._sha256 = fail
        step, restored, meta = checkpoints.restore_newest(abstract, reports.append)
        assert step == 1 and meta == {"step": 1}
        assert all((shard.data == 1).all() for shard in restored["a"].addressable_shards)
        assert checkpoints.restore_frozen(frozen) is not None
        checkpoints.save(3, restored, {"step": 3})
        checkpoints.close()
        open(f"{sys.argv[1]}-{index}.txt", "w").writelines(f"{line}\\n" for line in reports)
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(run_script(script, str(tmp_path), str(index), port, "2")) for index in range(2)
        ]
        for index, process in enumerate(processes):
            _, err = process.communicate(timeout=60)
            assert not process.returncode, err
            why = "ValueError: garbage" if index else "process 1 cannot read it"
            given_up = f"{tmp_path}/2: meta/meta.json: {why}: set aside, resuming from the previous checkpoint"
            assert Path(f"{tmp_path}-{index}.txt").read_text().splitlines() == [given_up]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "frozen"]
    checkpoints = Checkpoints(tmp_path, keep=2)
    wanted = {"a": jax.ShapeDtypeStruct((64, 512), np.float32, sharding=NamedSharding(make_mesh(2, 4), P("tensor")))}
    found = checkpoints.restore_newest(wanted, refuse)
    assert found is not None and found[0] == 3 and np.array_equal(found[1]["a"], np.ones((64, 512)))
    checkpoints.close()


def test_digest_does_not_depend_on_the_mesh():
    draw = np.random.default_rng(0)
    dtypes = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool"]
    arrays = [draw.integers(0, 2, (16, 8, 24)).astype(np.dtype(dtype)) for dtype in dtypes]
    found = {tuple(digests([jnp.asarray(array) for array in arrays]))}
    for shape, spec in [((8, 1), ("fsdp",)), ((4, 2), (None, "tensor", "fsdp")), ((2, 4), (("fsdp", "tensor"),))]:
        found.add(tuple(digests([place(make_mesh(*shape), array, *spec) for array in arrays])))
    assert len(found) == 1


def test_digest_of_odd_shapes(mesh: Mesh):
    arrays = [np.float32(1), np.zeros((0, 4), np.float32), np.zeros(4, np.float32), np.zeros((4, 1), np.float32)]
    assert len(set(digests([place(mesh, array) for array in arrays]))) == 4
    assert digests([]) == []


_BITS = {"float32": np.uint32, "bfloat16": np.uint16, "int8": np.uint8}


@given(st.data(), st.sampled_from(sorted(_BITS)))
def test_digest_covers_every_bit(data: st.DataObject, dtype: str):
    """Including NaN payloads, signed zeros and denormals."""
    width = 8 * np.dtype(_BITS[dtype]).itemsize
    draw = np.random.default_rng(data.draw(st.integers(0, 9)))
    bits = draw.integers(0, 2**width, (3, 5), dtype=_BITS[dtype])
    bits[0] = np.array([np.nan, 0, -0.0, 1e-45, np.inf]).astype(np.dtype(dtype)).view(_BITS[dtype]) if width > 8 else 0
    before = digests([jnp.asarray(bits.view(np.dtype(dtype)))])
    row, column = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 4))
    changed = bits.copy()
    changed[row, column] ^= _BITS[dtype](1 << data.draw(st.integers(0, width - 1)))
    assert digests([jnp.asarray(changed.view(np.dtype(dtype)))]) != before
    swapped = bits.copy()
    swapped[row] = bits[row - 1]
    swapped[row - 1] = bits[row]
    assert digests([jnp.asarray(swapped.view(np.dtype(dtype)))]) != before


def test_digest_gathers_nothing(mesh: Mesh):
    replicated = NamedSharding(mesh, P())
    specs = [("fsdp", "tensor"), ("tensor", None), (None, "fsdp"), ()]
    arrays = [
        jax.ShapeDtypeStruct((256, 512), dtype, sharding=NamedSharding(mesh, P(*spec)))
        for spec in specs
        for dtype in ("float32", "bfloat16")
    ]
    compiled = _program(replicated).lower(arrays).compile()
    text = compiled.as_text()
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", text)
    assert "all-gather(" in text  # only of the sums
    assert all(math.prod(map(int, filter(None, shape.split(",")))) <= 8 for shape in shapes)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**14
