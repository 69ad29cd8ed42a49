"""Several processes start, stop and die together: real ones, two with four devices each."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from tli_jax.errors import OutputError, UsageError
from tli_jax.parallel import processes

HEARTBEAT = 5
LOST = f"error: {processes.LOST}\n"

# What a training is to these tests: steps over all devices, until something happens to it.
SCRIPT = """
import os, sys, time
from tli_jax import command
from tli_jax.errors import DataError
from tli_jax.parallel import processes

process, timeout, heartbeat, what, folder = sys.argv[1:]

def main(arguments):
    assert "jax" not in sys.modules
    processes.start(False, process, int(timeout), int(heartbeat))
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    step = jax.jit(lambda flags: flags.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    with processes.first():
        print("first" if processes.is_first() else "then", os.path.exists(f"{folder}/written"), flush=True)
        if processes.is_first():
            if what == "first":
                raise DataError("my own error")
            open(f"{folder}/written", "w").close()
    with processes.StopSignal() as stop:
        for number in range(20 if what == "end" else 100_000):
            if int(step(processes.flag_array(mesh, stop.requested))):
                print("stopped at", number, flush=True)
                processes.leave(75)
            if number == 10:
                print("running", os.getpid(), flush=True)
                if what == f"raise {jax.process_index()}":
                    raise DataError("my own error")
                if what == "all raise":
                    time.sleep(jax.process_index())
                    raise DataError("my own error")
                if what == f"busy {jax.process_index()}":
                    time.sleep(1000)
            time.sleep(0.01)

def lost(arguments):
    with processes.peers():
        main(arguments)

processes.leave(command.run(lost, []))
"""


class Run:
    """Two processes of the script."""

    def __init__(self, folder, what, count=2, timeout=60):
        self.folder, (folder / "written").unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-W", "error", "-c", SCRIPT, f"{index}/2@{where}", str(timeout), str(HEARTBEAT), what]
                + [str(folder)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]
