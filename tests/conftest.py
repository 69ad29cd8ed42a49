"""The environment of all tests: a CPU that simulates eight devices, no network, and shared fixtures."""

import ctypes
import fcntl
import gc
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

if "jax" in sys.modules:
    raise RuntimeError("a plugin imported jax before tests/conftest.py could set its platform")

# For another platform: JAX_PLATFORMS=cuda python -m pytest
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile a lot and compute little. These flags halve the time of most tests: no optimisation, the older and
# simpler code generator for fusions, and one LLVM module per program.
_XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    # Later versions have no other generator, and XLA aborts on a flag that it does not know.
    *["--xla_cpu_use_fusion_emitters=false"] * importlib.metadata.version("jaxlib").startswith("0.10."),
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_XLA_FLAGS]).strip()
os.environ["HF_HUB_OFFLINE"] = "1"

# Each worker of pytest-xdist has a core of its own: threads that wait for each other on different cores take a fifth
# longer. Set before jax is imported, so that XLA starts as many threads as it has cores.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")) and CORES:
    os.sched_setaffinity(0, {CORES[int(worker.removeprefix("gw")) % len(CORES)]})

# Traced and compiled programs stay in memory. Searching all of them for garbage every few hundred objects took a sixth
# of the time.
gc.set_threshold(50_000, 10, 10)

# No deadline, because first calls compile. Derandomized, so that a failure comes from the change, not from chance.
settings.register_profile("tli_jax", deadline=None, derandomize=True)
settings.load_profile("tli_jax")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Give the processes that a test marked ``all_cores`` starts all cores.

    On one core, processes that compute together take twice as long, because one polls while it keeps the other waiting.
    """
    if not CORES or item.get_closest_marker("all_cores") is None:
        return (yield)
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        return (yield)
    finally:
        os.sched_setaffinity(0, own)


@pytest.fixture(autouse=True)
def _full_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-xdist sets COLUMNS in its workers, and tables honour it."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Forget compiled programs before they fill the memory: a worker ended with more than 5 GB.

    Until then, spare the garbage collector what earlier modules and imports have left: a search of it all takes half a
    second, and a run searches after each checkpoint that it cannot read.
    """
    gc.collect()
    gc.freeze()
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 2 * 2**30:
        import jax

        gc.unfreeze()
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or glibc keeps what was freed


@pytest.fixture(scope="session")
def material() -> Path:
    """Folder with real checkpoints and texts, which only some machines have."""
    default = Path(__file__).parents[2] / "shared" / "material"
    folder = Path(os.environ.get("TLI_JAX_MATERIAL", default))
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist; TLI_JAX_MATERIAL names another folder")
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Create a folder once per session, for all workers; the others wait until it is complete."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def once(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def start(once) -> Path:
    """Inputs for training: ``base`` with 4 layers, ``grown`` with 6, and ``ids.npy`` with a learnable pattern."""

    def make(folder: Path) -> None:
        import jax
        import numpy as np

        import tli_jax

        config = tli_jax.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=0,
        )
        params, plan = tli_jax.init_params(config, jax.random.key(0)), tli_jax.tli(4, every=2)
        tli_jax.save_hf(folder / "base", config, params)
        tli_jax.save_hf(folder / "grown", config, tli_jax.inject(params, plan), plan=plan)
        ids, rng = [0], np.random.default_rng(0)
        for _ in range(4000):
            ids.append(int(rng.integers(64)) if rng.random() < 0.1 else (5 * ids[-1] + 7) % 64)
        np.save(folder / "ids.npy", np.array(ids, np.uint16))

    return once("start", make)


@pytest.fixture(scope="session")
def compiled(once) -> dict[str, str]:
    """Environment that lets processes share compiled programs."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(once("compiled", lambda _: None)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="module")
def _compile_once(compiled):
    """Let this process use the shared compiled programs, too."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = {name.lower(): getattr(jax.config, name.lower()) for name in compiled}
    for name, value in compiled.items():
        jax.config.update(name.lower(), value if "dir" in name.lower() else int(value))
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
