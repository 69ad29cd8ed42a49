"""What the checks share: the configuration, and what earlier checks found."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tli_jax.cli.growth_config import PreflightConfig
from tli_jax.cli.libtpu import has_compiler
from tli_jax.cli.train_config import TrainConfig
from tli_jax.distributed import topology
from tli_jax.errors import TliError, UsageError
from tli_jax.growth.plan import Plan
from tli_jax.hf.checkpoint import Checkpoint

if TYPE_CHECKING:
    from tli_jax.training.trainer import Trainer

Result = tuple[str, dict[str, Any]]  # a line of text, and facts for --json
Value = TypeVar("Value")


class NotCheckedError(Exception):
    """Something that the check needs is missing on this machine."""


class DoesNotFitError(UsageError):
    """A program needs more memory than a device has."""

    def __init__(self, message: str, facts: dict[str, Any]):
        super().__init__(message)
        self.facts = facts


@dataclasses.dataclass
class Finding:
    """The outcome of one check. ``status`` is ok, fails or not checked."""

    name: str
    status: str
    text: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: TliError | None = None


@dataclasses.dataclass
class Context:
    """The configuration, and the results of checks on which later ones build.

    Attributes:
        T: sequence length.
        writes: the files that will be written: description, path, bytes.
    """

    config: PreflightConfig
    base: Checkpoint | None = None
    plan: Plan | None = None
    trainer: "Trainer | None" = None
    T: int = 0
    writes: list[tuple[str, Path, int]] = dataclasses.field(default_factory=list)

    @property
    def grows(self) -> bool:
        return self.config.output is not None or self.config.train is None

    @property
    def train(self) -> TrainConfig:
        assert self.config.train is not None, "this check belongs to training"
        return self.config.train

    @property
    def base_folder(self) -> Path | None:
        """The folder of the base, if it is on this machine."""
        return self.base.folder if self.base is not None and self.base.folder.is_dir() else None

    @property
    def is_on_paper(self) -> bool:
        """Whether the devices are GPUs that this machine does not have, so that memory can only be estimated."""
        return self.config.topology is not None and topology.parse_topology(self.config.topology).is_gpu

    def devices(self) -> list[Any] | None:
        """The devices to compile for. None for those of this machine."""
        if not self.config.topology:
            return None
        requested = topology.parse_topology(self.config.topology, self.config.slices)
        if not requested.is_gpu and not has_compiler():
            raise NotCheckedError(f"compiling for {requested} needs libtpu: pip install 'jax[tpu]'")
        return topology.compile_only_devices(requested)

    def stored_dtype(self, spec: Any) -> Any:
        """The dtype in which the base stores a parameter, or the parameter from which growth will make it."""
        base = require(self.base, "a model")
        is_stored = spec.tensor in base.config.layer_tensors or not spec.layers
        return base.stack(spec.tensor if is_stored else "mlp.gate_proj.weight", spec.layers[:1] and (0,)).dtype


def require(value: Value | None, name: str) -> Value:
    """The result of an earlier check.

    Raises:
        NotCheckedError: there is none, because that check did not succeed.
    """
    if value is None:
        raise NotCheckedError(f"needs {name}")
    return value


def join(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
