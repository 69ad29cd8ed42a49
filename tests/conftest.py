"""What every test stands on: a CPU that shows eight devices, no network, and the shared material where it is."""

import fcntl
import gc
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could set its platform: no plugin may import it")

# To run on another platform, set it: JAX_PLATFORMS=cuda python -m pytest
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile much and compute little: machine code that is not optimised is there in two thirds of the time.
_XLA_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_XLA_FLAGS}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"

# What is compiled and traced stays in memory; to look through all of it for garbage, every few hundred objects, took a
# sixth of the time.
gc.set_threshold(50_000, 10, 10)

# No deadline: a first call compiles. Derandomised: a failure belongs to the change, not to the draw.
settings.register_profile("tli_jax", deadline=None, derandomize=True)
settings.load_profile("tli_jax")


@pytest.fixture(scope="session")
def material() -> Path:
    """Folder of the shared material: real checkpoints and texts, which only some machines have."""
    beside = Path(__file__).parents[2] / "shared" / "material"
    folder = Path(os.environ.get("TLI_JAX_MATERIAL", beside))
    if not folder.is_dir():
        pytest.skip(f"the shared material is not here: {folder} (TLI_JAX_MATERIAL names another folder)")
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Makes a folder by that name once a session, however many workers ask for it; the others wait."""
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
    """A folder to train from: ``base`` of 4 layers, ``grown`` of 6, and ``ids.npy`` with something to learn in it."""

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
        ids, draw = [0], np.random.default_rng(0)
        for _ in range(4000):
            ids.append(int(draw.integers(64)) if draw.random() < 0.1 else (5 * ids[-1] + 7) % 64)
        np.save(folder / "ids.npy", np.array(ids, np.uint16))

    return once("start", make)


@pytest.fixture(scope="session")
def compiled(once) -> dict[str, str]:
    """Environment of processes that compile the same programs: the second one finds them."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(once("compiled", lambda _: None)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="module")
def _compile_once(compiled):
    """In this process too what was compiled before is found."""
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
