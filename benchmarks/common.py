"""Shared by the benchmarks: facts about the machine, results files, and measurements in a process of their own."""

import json
import multiprocessing
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """CPU, cores that this process can use, operating system and load."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0))
    return {"cpu": cpu, "cores": cores, "system": platform.platform(), "load_average": os.getloadavg()}


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    installed = {name: version for name in packages for version in _version(name)}
    return {"python": platform.python_version()} | installed


def _version(package: str) -> list[str]:
    try:
        return [metadata.version(package)]
    except metadata.PackageNotFoundError:  # for example a source tree on PYTHONPATH
        return []


def write_result(name: str, result: dict[str, Any]) -> None:
    """Write ``benchmarks/results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run_in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process, so that its imports and peak memory are its own.

    Raises:
        BrokenProcessPool: the process died, for example because it ran out of memory.
    """
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
