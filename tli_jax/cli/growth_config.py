"""Configuration of growth and preflight. Every field is a YAML key and a command-line flag (see ``cli.parse``)."""

import pydantic
from pydantic.dataclasses import dataclass

from tli_jax.cli.growth_options import GrowthOptions
from tli_jax.cli.keys import CHECKS, IO, JSON, OVERWRITE, PROOF, REVISION, SHARD
from tli_jax.cli.train_config import TrainConfig
from tli_jax.cli.values import PathText, Positive, Shape, Text, option
from tli_jax.errors import UsageError


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class UpscaleConfig(GrowthOptions):
    """Configuration of ``tli-jax upscale``."""

    model: PathText = option(
        "", "folder, GGUF file, Hub id, or 'embedded' for the small base in the package", IO, shown="required"
    )
    output: PathText | None = option(None, "folder to write; not needed with --plan-only", IO, shown="required")
    revision: str | None = option(None, REVISION, IO)
    proof: bool = option(True, "run the base and the grown model and compare every logit", PROOF)
    text: PathText | None = option(None, "UTF-8 text for the proof and for adept", PROOF, shown="a text in the package")
    sample: str | None = option(None, "prompt to continue with the base and the grown model at the end", PROOF)
    allow_nonfinite: bool = option(False, "accept weights that are NaN or infinite", PROOF)
    shape: Shape = option(
        None,
        "expected architecture, e.g. llama3.1-8b (in YAML also the keys of a config.json); the model must match",
        PROOF,
    )
    plan_only: bool = option(False, "print the plan from headers and configuration alone; write nothing", IO)
    json: bool = option(False, JSON, IO)
    overwrite: bool = option(False, OVERWRITE, IO)
    max_shard_size: Text = option("5GB", SHARD, IO)
    train: TrainConfig | None = option(None, "section: continued pretraining of the grown model", IO)

    def check_grows_once(self) -> None:
        """Raise ``UsageError`` if the section ``train`` would grow the output once more."""
        if self.train is not None and self.train.grow is not None:
            raise UsageError("train.grow: the output is grown already: remove it, or use tli-jax train alone")


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class PreflightConfig(UpscaleConfig):
    """Configuration of ``tli-jax preflight``: check what ``upscale`` and ``train`` would do, possibly for another
    machine."""

    topology: str | None = option(
        None,
        "TPU slice to compile for, e.g. v5p-64 or v5p:2x4x4, or GPUs to estimate memory for, e.g. h100-64",
        CHECKS,
        shown="the devices of this machine",
    )
    slices: Positive = option(1, "number of such slices", CHECKS)
    search: bool = option(False, "find the largest batch per device and the cheapest remat that fit", CHECKS)
    strict: bool = option(False, "fail if a check cannot be made here", CHECKS)
