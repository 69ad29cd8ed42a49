"""libtpu, the TPU compiler and runtime, on machines without a TPU."""

import glob
import importlib.metadata
import importlib.util
import os


def has_compiler() -> bool:
    """Return whether libtpu, the TPU compiler and runtime, is installed (extra ``tpu``)."""
    return importlib.util.find_spec("libtpu") is not None


# Where libtpu looks for the type and the hosts of its TPU, before it asks the metadata server, and its log levels.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
_NOT_A_TPU = {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"}  # set by JAX and libtpu on every machine


def _may_have_tpu() -> bool:
    devices = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")  # noqa: PTH207
    return bool(devices) or any(name.startswith("TPU_") and name not in _NOT_A_TPU for name in os.environ)


def silence_libtpu() -> None:
    """Keep libtpu quiet on a machine without a TPU; elsewhere, do nothing. Call before JAX is imported.

    JAX loads every installed backend. Without a TPU, libtpu waits for a metadata server and prints warnings from C++.
    If no other accelerator plugin is installed, JAX uses the CPU and does not load libtpu at all.
    """
    if not has_compiler() or _may_have_tpu():
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not importlib.metadata.entry_points(group="jax_plugins") and importlib.util.find_spec("jax_plugins") is None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
