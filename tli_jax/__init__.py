"""tli_jax: make a trained Llama deeper, prove what that did to it, and go on from there, in JAX.

The functional API. Everything is imported on first use, so that ``import tli_jax`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tli_jax.errors import TliError
    from tli_jax.growth.experts import Experts
    from tli_jax.growth.inject import inject
    from tli_jax.growth.methods import (
        adept,
        average,
        custom,
        dus,
        interpose,
        lesa,
        lidas,
        llama_pro,
        midas,
        moe,
        opt_deus,
        slayer,
        stack,
        tli,
    )
    from tli_jax.growth.plan import Plan, Row
    from tli_jax.growth.upcycle import upcycle
    from tli_jax.hf.grown_config import grown_config
    from tli_jax.hf.load import load_hf
    from tli_jax.hf.save import save_hf
    from tli_jax.models.config import LlamaConfig
    from tli_jax.models.generate import generate_tokens
    from tli_jax.models.llama import Llama, forward, init_params
    from tli_jax.models.loss import losses
    from tli_jax.verify.importance import measure_importance

__version__ = "0.1.0"

_HOMES = {
    "tli_jax.hf.load": ("load_hf",),
    "tli_jax.hf.grown_config": ("grown_config",),
    "tli_jax.verify.importance": ("measure_importance",),
    "tli_jax.hf.save": ("save_hf",),
    "tli_jax.errors": ("TliError",),
    "tli_jax.growth.experts": ("Experts",),
    "tli_jax.growth.inject": ("inject",),
    "tli_jax.growth.plan": ("Plan", "Row"),
    "tli_jax.growth.methods": (
        *("tli", "dus", "llama_pro", "slayer", "average", "stack", "interpose"),
        *("opt_deus", "lesa", "midas", "lidas", "adept", "moe", "custom"),
    ),
    "tli_jax.growth.upcycle": ("upcycle",),
    "tli_jax.models.config": ("LlamaConfig",),
    "tli_jax.models.generate": ("generate_tokens",),
    "tli_jax.models.llama": ("Llama", "forward", "init_params"),
    "tli_jax.models.loss": ("losses",),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Experts",
    "Llama",
    "LlamaConfig",
    "Plan",
    "Row",
    "TliError",
    "adept",
    "average",
    "custom",
    "dus",
    "forward",
    "generate_tokens",
    "grown_config",
    "init_params",
    "inject",
    "interpose",
    "lesa",
    "lidas",
    "llama_pro",
    "load_hf",
    "losses",
    "measure_importance",
    "midas",
    "moe",
    "opt_deus",
    "save_hf",
    "slayer",
    "stack",
    "tli",
    "upcycle",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tli_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
