"""Two real processes write one export: each its own files, if both see the folder; and they fail together."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

import tli_jax
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.tensors import read_tensor

# The export of a run, without the run: the tensors of a sharded model, made by both processes together.
PROCESS = """
import functools, sys
from pathlib import Path
from tli_jax.cli.frame import run_command
from tli_jax.distributed import processes

def main(arguments):
    address, model, output = arguments
    processes.start(False, address)
    import jax
    from jax.sharding import NamedSharding, PartitionSpec
    from tli_jax.distributed.mesh import make_mesh
    from tli_jax.hf.load import load_hf
    from tli_jax.hf.save import _output_tensor, unstack
    from tli_jax.hf.shards import split_shards
    from tli_jax.hf.write import write_model
    from tli_jax.training.export_files import write_together

    mesh = make_mesh({"fsdp": 8})
    config, params = load_hf(model, shardings=NamedSharding(mesh, PartitionSpec()))
    tensors = [_output_tensor(name, lambda get=get: get().addressable_data(0)) for name, get in unstack(config, params)]
    if processes.is_first():
        write = functools.partial(write_together, tensors, 10**9)
        with write_model(Path(output), split_shards(tensors, 10**9), config.to_hf(), write=write) as written:
            assert written.digests.keys() == {tensor.name for tensor in tensors}
    else:
        write_together(tensors, 10**9, None)
    processes.barrier("export")

processes.leave(run_command(main, sys.argv[1:]))
"""
pytestmark = pytest.mark.all_cores

# Files of up to 4 KiB only, which stands for a full disk.
LIMIT = ["sh", "-c", 'ulimit -f 8 && exec "$0" "$@"']
# Hides the parent folder of the output from one process, as on another machine.
HIDE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"']


def run(model: Path, output: Path, second: Sequence[Any] = ()) -> tuple[list[int], list[str]]:
    """The exit codes and error messages of two processes, the second started by the command ``second``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    output.parent.mkdir()
    group = []
    for index in range(2):
        prefix = second if index else ()
        command = [*prefix, sys.executable, "-W", "error", "-c", PROCESS, f"{index}/2@{address}"]
        group.append(subprocess.Popen([*command, model, output], env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=100)[1] for process in group]
    return [process.returncode for process in group], errors


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    config = tli_jax.LlamaConfig(48, 16, 24, 3, 4, 2, 4)
    tli_jax.save_hf(folder, config, tli_jax.init_params(config, jax.random.key(0)))
    return folder


def tensors(folder: Path) -> dict[str, bytes]:
    return {name: read_tensor(tensor).tobytes() for name, tensor in open_checkpoint(folder).tensors.items()}


def test_each_process_writes_its_files(model: Path, tmp_path: Path):
    output = tmp_path / "folder" / "out"
    assert run(model, output) == ([0, 0], ["", ""])
    assert tensors(output) == tensors(model)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    names = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert set(index["weight_map"].values()) == names
    assert {file.name for file in output.iterdir()} == names | {"config.json", "model.safetensors.index.json"}
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_the_first_writes_everything_if_the_other_does_not_see_the_folder(model: Path, tmp_path: Path):
    if shutil.which("unshare") is None or subprocess.run([*HIDE, tmp_path, "true"], capture_output=True).returncode:
        pytest.skip("only root may hide a folder from one process (unshare --mount)")
    output = tmp_path / "folder" / "out"
    assert run(model, output, [*HIDE, output.parent]) == ([0, 0], ["", ""])
    assert tensors(output) == tensors(model)
    assert {file.name for file in output.iterdir()} == {"config.json", "model.safetensors"}


def test_a_full_disk_of_one_ends_both_and_leaves_nothing(model: Path, tmp_path: Path):
    output = tmp_path / "folder" / "out"
    codes, errors = run(model, output, LIMIT)
    assert codes == [74, 74]
    assert "process 1 cannot write its files (File too large)" in errors[0] and "File too large" in errors[1]
    assert not list(output.parent.iterdir())
