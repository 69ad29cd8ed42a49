"""tli_jax: make a trained Llama deeper, prove what that did to it, and train it on, in JAX.

This is the functional API. Names are imported when they are first used, so ``import tli_jax`` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tli_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from tli_jax.errors import TliError as TliError
    from tli_jax.evaluation.continuation import continue_prompt as continue_prompt
    from tli_jax.evaluation.evaluate import evaluate_model as evaluate_model
    from tli_jax.growth.custom import custom as custom
    from tli_jax.growth.experts import Experts as Experts
    from tli_jax.growth.inject import inject as inject
    from tli_jax.growth.methods import adept as adept
    from tli_jax.growth.methods import average as average
    from tli_jax.growth.methods import dus as dus
    from tli_jax.growth.methods import interpose as interpose
    from tli_jax.growth.methods import lesa as lesa
    from tli_jax.growth.methods import lidas as lidas
    from tli_jax.growth.methods import llama_pro as llama_pro
    from tli_jax.growth.methods import midas as midas
    from tli_jax.growth.methods import moe as moe
    from tli_jax.growth.methods import opt_deus as opt_deus
    from tli_jax.growth.methods import slayer as slayer
    from tli_jax.growth.methods import stack as stack
    from tli_jax.growth.methods import tli as tli
    from tli_jax.growth.plan import Plan as Plan
    from tli_jax.growth.rows import Row as Row
    from tli_jax.growth.upcycle import upcycle as upcycle
    from tli_jax.hf.grown_config import grown_config as grown_config
    from tli_jax.hf.load import load_hf as load_hf
    from tli_jax.hf.save import save_hf as save_hf
    from tli_jax.models.config import LlamaConfig as LlamaConfig
    from tli_jax.models.generate import generate_tokens as generate_tokens
    from tli_jax.models.llama import Llama as Llama
    from tli_jax.models.llama import forward as forward
    from tli_jax.models.llama import init_params as init_params
    from tli_jax.models.loss import losses as losses
    from tli_jax.training.trainer import Trainer as Trainer
    from tli_jax.verify.importance import measure_importance as measure_importance
    from tli_jax.verify.proof import prove as prove
    from tli_jax.verify.scan import scan as scan

_EXPORTS = {
    "errors": "TliError",
    "evaluation.continuation": "continue_prompt",
    "evaluation.evaluate": "evaluate_model",
    "growth.custom": "custom",
    "growth.experts": "Experts",
    "growth.inject": "inject",
    "growth.methods": "adept average dus interpose lesa lidas llama_pro midas moe opt_deus slayer stack tli",
    "growth.plan": "Plan",
    "growth.rows": "Row",
    "growth.upcycle": "upcycle",
    "hf.load": "load_hf",
    "hf.grown_config": "grown_config",
    "hf.save": "save_hf",
    "models.config": "LlamaConfig",
    "models.generate": "generate_tokens",
    "models.llama": "Llama forward init_params",
    "models.loss": "losses",
    "training.trainer": "Trainer",
    "verify.importance": "measure_importance",
    "verify.proof": "prove",
    "verify.scan": "scan",  # hidden by the command of this name where that was imported, as in tli_jax.__main__
}
_MODULES = {name: f"tli_jax.{module}" for module, names in _EXPORTS.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tli_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*_MODULES, "__version__"])
