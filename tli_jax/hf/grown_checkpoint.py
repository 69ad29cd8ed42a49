"""A base that is grown while it is read: a tensor of the grown model is made when it is loaded, and never stored."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tli_jax.growth.plan import Plan
from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.hf.grown_config import grow_config
from tli_jax.hf.grown_tensors import grown_tensors
from tli_jax.hf.shards import OutputTensor
from tli_jax.models.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class GrownCheckpoint(Checkpoint):
    """Loads like the folder that growth would write. ``folder`` and ``tensors`` are those of the base.

    Attributes:
        made: the tensors of the grown model, by Hugging Face name.
        facts: what initialisers that run on the host found; empty until tensors are made.
    """

    made: Mapping[str, OutputTensor] = dataclasses.field(default_factory=dict, repr=False)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def trainings(self) -> list[dict[str, Any]]:
        return []

    @property
    def sources(self) -> Mapping[str, Any]:
        return self.made


def grow_checkpoint(base: Checkpoint, plan: Plan, record: dict[str, Any]) -> GrownCheckpoint:
    """Apply a plan to a base while it is read.

    Args:
        record: the content of ``growth.json``.

    Raises:
        UsageError: the plan does not fit the base.
    """
    facts: dict[str, Any] = {}
    made = {tensor.name: tensor for tensor in grown_tensors(base, plan, facts)}
    config = LlamaConfig.from_hf(grow_config(base.raw, base.config, plan), str(base.folder / "config.json"))
    return GrownCheckpoint(base.folder, config, base.tensors, base.warnings, record, base.stamps, made, facts)
