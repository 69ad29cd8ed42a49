"""Choose a rematerialization policy with which the compiled train step fits in memory."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from tli_jax.distributed.processes import gather_json
from tli_jax.errors import UsageError
from tli_jax.hf.files import cache_folder
from tli_jax.models.llama import Remat
from tli_jax.training.freezing import ParamSpec
from tli_jax.training.memory import POLICIES, CompiledMemory, compile_step, estimate, gib, hints
from tli_jax.training.step import Programs

P = TypeVar("P", bound=Programs)
_CACHE = "jax_compilation_cache_dir"


def cache_programs(mesh: Mesh) -> str | None:
    """Let accelerators keep compiled programs between starts. Return the folder; None on a CPU, which compiles fast.

    The environment variable JAX_COMPILATION_CACHE_DIR chooses another folder.
    """
    if mesh.devices.flat[0].platform == "cpu":
        return None
    if (folder := getattr(jax.config, _CACHE)) is None:
        folder = str(cache_folder() / "compiled")
        jax.config.update(_CACHE, folder)
    return folder


def free_memory(mesh: Mesh) -> float | None:
    """Bytes that this process may use on each of its devices; None if the system does not say.

    CPU devices share what is free on the host, or in the memory cgroup of this process.
    """
    local = mesh.local_devices
    if local[0].platform != "cpu":
        stats = local[0].memory_stats()
        return stats["bytes_limit"] if stats else None
    free = [_meminfo("MemAvailable")]
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        (group / "memory.max", group / "memory.current"),
        (group / "memory/memory.limit_in_bytes", group / "memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii")))
        except (OSError, ValueError):  # another version of cgroups, or no limit
            continue
    known = [nbytes for nbytes in free if nbytes is not None]
    return max(min(known), 0) / len(local) if known else None


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def fit(
    programs: P,
    T: int,
    dtypes: Callable[[ParamSpec], Any],
    limit: float | None,
    report: Callable[[str], None],
    *,
    first: Remat | None = None,
    held: Callable[[CompiledMemory], float] = lambda memory: 0.0,
) -> tuple[P, CompiledMemory | None]:
    """Compile the train step. With ``remat: auto``, choose the cheapest policy that fits.

    In a run of several processes, all choose the same.

    Args:
        T: tokens per sequence.
        dtypes: stored dtype of each frozen array.
        limit: bytes per device; None skips the check, and ``auto`` becomes ``full``.
        report: called with one line for each attempt.
        first: the policy that an earlier part of the run chose, tried first: another one may round differently.
        held: the part of the peak that is in memory already.

    Returns:
        The programs with their policy, and the memory of the step; None without a limit. If nothing fits, the memory is
        that of the last policy.
    """
    config, is_auto = programs.config, programs.config.remat == "auto"
    if limit is None:
        if is_auto:
            report("remat: full, because the memory of the device is not known")
            programs = _with_remat(programs, "full")
        return programs, None
    policies = dict.fromkeys([first, *POLICIES] if first else POLICIES) if is_auto else [config.remat]
    memory: CompiledMemory | None = None
    last = [*policies][-1]
    for policy in policies:
        programs = _with_remat(programs, policy) if is_auto else programs
        is_last = policy == last
        if not is_last and estimate(programs, T, dtypes)["activations"] > limit:
            report(f"remat {policy}: does not fit, activations alone would need more than {gib(limit)}")
            continue
        memory = compile_step(programs, T, dtypes)
        found = {"fits": memory.fits and memory.peak - held(memory) <= limit}
        if all(other["fits"] for other in gather_json(found)):
            break
        memory = dataclasses.replace(memory, fits=False)
        if not is_last:
            report(f"remat {policy}: does not fit, {gib(memory.peak)} of {gib(limit)} per device")
    return programs, memory


def require_fit(programs: Programs, T: int, memory: CompiledMemory | None, limit: float | None) -> None:
    """Raise ``UsageError``, with options that reduce memory, if the step does not fit."""
    if memory is not None and limit is not None and not memory.fits:
        raise UsageError(
            f"the train step does not fit: it needs {gib(memory.peak)} of {gib(limit)} per device; {hints(programs, T)}"
        )


def _with_remat(programs: P, remat: Any) -> P:
    return dataclasses.replace(programs, config=dataclasses.replace(programs.config, remat=remat))
