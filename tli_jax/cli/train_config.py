"""Configuration of training. Every field is a YAML key and a command-line flag (see ``cli.parse``)."""

from typing import Literal

import pydantic
from pydantic.dataclasses import dataclass

from tli_jax.cli.growth_options import GrowthOptions
from tli_jax.cli.keys import (
    BATCH,
    DATA,
    DEVICES,
    DISTRIBUTED,
    IO,
    OPTIMIZER,
    OVERWRITE,
    PROCESS,
    REVISION,
    SAVING,
    SHARD,
    TIMEOUTS,
)
from tli_jax.cli.values import (
    Adam,
    Amount,
    Auxiliary,
    BatchSize,
    Degrees,
    FloatType,
    FloatTypes,
    Fraction,
    NotNegative,
    PathText,
    Positive,
    Rates,
    Separator,
    Sources,
    Steps,
    Text,
    Timeouts,
    Tracked,
    option,
)


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class TextConfig:
    """Which text is read, and how it becomes token ids."""

    text: Sources = option(
        (), "files, folders or prepared data, separated by commas, or 'embedded'; in YAML {path, weight}", DATA
    )
    separator: Separator = option(
        None, r"separates documents in plain text, e.g. '\n'", DATA, shown="a file is one document"
    )
    field: str = option("text", "text field of JSONL, Parquet and datasets folders", DATA)
    bos: bool = option(True, "put BOS before each document, if the model has one", DATA)
    eos: bool = option(True, "put EOS after each document, if the model has one", DATA)
    special_tokens: Literal["text", "parse"] = option(
        "text", "special tokens such as </s> in a document: read as text, or parsed to their ids", DATA
    )
    on_bad: Literal["refuse", "skip"] = option("refuse", "unreadable documents: refuse the source, or skip them", DATA)


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Reading(TextConfig):
    """How text becomes batches, and the devices they run on."""

    verify: bool = option(False, "check the SHA-256 of all token ids, prepared or cached, in every process", DATA)
    isolate: bool = option(
        True, "attention stays within a document (the loss never crosses documents in any case)", DATA
    )
    batch_size: BatchSize = option(8, "sequences per step, over all devices", BATCH)
    sequence_length: Positive | None = option(
        None, "tokens per sequence", BATCH, shown="the model's context, at most 2048"
    )
    dtypes: FloatTypes = option(
        {},
        "dtypes of trainable parameters, their first moment, and activations",
        BATCH,
        shown="param=float32,moment=float32,compute=bfloat16",
    )
    attention: Literal["auto", "xla", "cudnn", "splash"] = option(
        "auto", "attention implementation; cudnn needs a GPU, splash a TPU", DEVICES
    )
    mesh: Degrees = option(
        {}, "devices along each axis, e.g. data=2,fsdp=4,expert=1,tensor=1; -1 takes the rest", DEVICES, shown="fsdp=-1"
    )

    @property
    def compute_dtype(self) -> FloatType:
        """Dtype of activations and matrix multiplications."""
        return self.dtypes.get("compute", "bfloat16")


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Recipe(Reading):
    """How a model is trained, independent of the model: data, number of steps, optimizer, devices."""

    validation_text: Sources = option((), "separate sources for validation", DATA, shown="the end of each source")
    validation_fraction: Fraction = option(
        0.05, "fraction of each source that is held out if there is no validation_text", DATA
    )
    steps: Positive = option(1000, "optimizer steps in total", OPTIMIZER)
    seed: NotNegative = option(0, "seed of the data order", DATA)
    outer: str | None = option(
        None,
        "trainable tensors outside the layers: all, none, or some of embed_tokens,norm,lm_head",
        OPTIMIZER,
        shown="all with only=all, otherwise none",
    )
    learning_rate: Rates = option(
        {"all": 1e-4}, "peak learning rate, optionally per group: 1e-4,injected=1e-3,kept=1e-5,outer=0", OPTIMIZER
    )
    warmup: Steps = option({"all": 0}, "warmup steps, optionally per group: 100,kept=500", OPTIMIZER)
    schedule: Literal["cosine", "wsd", "constant"] = option("cosine", "learning-rate schedule", OPTIMIZER)
    decay_fraction: Fraction = option(0.2, "wsd: fraction of all steps for the final linear decay", OPTIMIZER)
    final_fraction: Fraction = option(0.1, "cosine and wsd: final learning rate as a fraction of the peak", OPTIMIZER)
    optimizer: Literal["adamw", "adafactor", "lion", "muon"] = option("adamw", "optimizer", OPTIMIZER)
    adam: Adam = option({}, "decay rates of the moments, and epsilon", OPTIMIZER, shown="b1=0.9,b2=0.95,eps=1e-8")
    weight_decay: Amount = option(
        0.1, "decoupled weight decay of layer matrices and the head, not of norms and the embedding", OPTIMIZER
    )
    clip_norm: Amount = option(1.0, "clip the global gradient norm to this; 0 disables it", OPTIMIZER)
    remat: Literal["auto", "none", "dots", "attention", "full", "offload"] = option(
        "auto",
        "rematerialized in the backward pass: nothing; all but attention and matrix products (dots); all but attention;"
        " everything; everything from layer inputs kept in host memory (offload); auto: the fastest that fits",
        BATCH,
    )
    grad_accum_steps: NotNegative = option(
        1, "microbatches per step; 0 gives each device one sequence at a time", BATCH
    )
    auxiliary: Auxiliary = option(
        {}, "weights of the z-loss and of the load-balancing loss of experts", OPTIMIZER, shown="z=0,balance=0.01"
    )
    skip_limit: Positive = option(
        10, "stop after this many consecutive bad steps (loss not finite, gradient spike), which are skipped", OPTIMIZER
    )
    spike: Amount = option(
        50.0, "a gradient norm this many times its running mean is a spike; 0 disables it", OPTIMIZER
    )
    save_every: Positive = option(500, "steps between checkpoints; the last step is always saved", SAVING)
    validate_every: Positive = option(
        100, "steps between validations; also before the first and after the last", SAVING
    )
    validation_batches: Positive = option(20, "batches per validation, at most", SAVING)

    @property
    def param_dtype(self) -> FloatType:
        """Dtype of trainable parameters."""
        return self.dtypes.get("param", "float32")

    @property
    def moment_dtype(self) -> FloatType:
        """Dtype of the optimizer's first moment."""
        return self.dtypes.get("moment", "float32")

    @property
    def z_loss(self) -> float:
        """Weight of the z-loss: the squared log of the softmax denominator."""
        return self.auxiliary.get("z", 0.0)

    @property
    def balance_loss(self) -> float:
        """Weight of the load-balancing loss."""
        return self.auxiliary.get("balance", 0.01)


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class TrainConfig(Recipe):
    """Configuration of ``tli-jax train``: continued pretraining."""

    model: PathText = option(
        "", "the start: folder (grown or not), GGUF file, run directory, Hub id or 'embedded'", IO, shown="required"
    )
    revision: str | None = option(None, REVISION, IO)
    run: PathText = option(
        "", "run directory for checkpoints, metrics and configuration; resumed if it exists", IO, shown="required"
    )
    export: PathText | None = option(None, "Hugging Face folder to write at the end", IO)
    export_only: bool = option(False, "do not train; export the newest checkpoint of the run", IO)
    only: str = option("all", "trainable layers: all, injected, last_n(N) or layers(0,3,7-9)", OPTIMIZER)
    distributed: bool = option(False, DISTRIBUTED, DEVICES)
    process: str | None = option(None, PROCESS, DEVICES)
    timeouts: Timeouts = option({}, TIMEOUTS, DEVICES, shown="start=300,heartbeat=100,leave=10")
    keep: Positive = option(3, "number of checkpoints to keep", SAVING)
    track: Tracked = option(
        (), "also log metrics to tensorboard (in the run directory) or wandb:PROJECT, separated by commas", SAVING
    )
    profile: NotNegative = option(
        0,
        "trace this many steps after the third into RUN/profile, and print where their time goes; 0 for none",
        SAVING,
    )
    max_shard_size: Text = option("5GB", SHARD, IO)
    overwrite: bool = option(False, OVERWRITE, IO)
    grow: GrowthOptions | None = option(
        None, "section: grow the model while it is loaded, with the options of upscale; no grown copy is written", IO
    )

    @property
    def wandb(self) -> str | None:
        """Project name in Weights & Biases."""
        return next((target.partition(":")[2] for target in self.track if target.startswith("wandb:")), None)
