"""What every test stands on: a CPU that shows eight devices, no network, and the shared material where it is."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could set its platform: no plugin may import it")

# To run on another platform, set it: JAX_PLATFORMS=cuda python -m pytest
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["HF_HUB_OFFLINE"] = "1"

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
