"""Typed configurations of the commands. Every field is a YAML key and a command-line flag (see ``cli.parse``)."""

import dataclasses
from typing import Annotated, Any, Literal

import pydantic
from pydantic.dataclasses import dataclass

from tli_jax.cli.values import (
    Adam,
    Amount,
    Auxiliary,
    BatchSize,
    Contenders,
    Degrees,
    FloatType,
    FloatTypes,
    Fraction,
    Layers,
    NotNegative,
    Number,
    Only,
    Paths,
    PathText,
    Positive,
    Rates,
    Seeds,
    Separator,
    Shape,
    Sources,
    Steps,
    Text,
    Tracked,
    Whole,
    one_of,
    option,
)
from tli_jax.growth.experts import UPCYCLES
from tli_jax.growth.methods import METHODS
from tli_jax.growth.rows import INITS

Method = Annotated[str, one_of(METHODS)]
Init = Annotated[str, one_of(INITS)]
Upcycle = Annotated[str, one_of(UPCYCLES)]

_TASKS = "multiple-choice tasks: JSONL files or folders (such as KoBEST), separated by commas, or 'embedded'"
_REVISION = "branch, tag or commit, if the model is a Hub id"
_JSON = "print JSON to stdout and everything else to stderr"
_DISTRIBUTED = "run as several processes, which find each other on Cloud TPU, GKE and Slurm"
_PROCESS = "this process of several elsewhere: INDEX/COUNT@HOST:PORT, with the address of process 0"
_SHARD = "size limit of a safetensors file"
_OVERWRITE = "replace an existing output once the new one is complete"

# Headings of --help.
IO, GROWTH, EXPERTS, PROOF = "input and output", "growth", "experts", "proof"
DATA, OPTIMIZER, BATCH, DEVICES = "data", "optimizer", "batch and precision", "devices"
SAVING, COMPARISON, CHECKS, OUTPUT, SAMPLING = "checkpoints and logs", "comparison", "checks", "output", "sampling"


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Reading:
    """How text becomes batches, and the devices they run on."""

    text: Sources = option(
        (), "files or folders to read, separated by commas, or 'embedded'; in YAML {path, weight}", DATA
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
    remat: Literal["none", "dots", "full"] = option(
        "full", "rematerialized in the backward pass: nothing, all but matrix products (dots), everything", BATCH
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
        "", "model to start from: folder (grown or not), run directory, Hub id or 'embedded'", IO, shown="required"
    )
    revision: str | None = option(None, _REVISION, IO)
    run: PathText = option(
        "", "run directory for checkpoints, metrics and configuration; resumed if it exists", IO, shown="required"
    )
    export: PathText | None = option(None, "Hugging Face folder to write at the end", IO)
    export_only: bool = option(False, "do not train; export the newest checkpoint of the run", IO)
    only: str = option("all", "trainable layers: all, injected, last_n(N) or layers(0,3,7-9)", OPTIMIZER)
    distributed: bool = option(False, _DISTRIBUTED, DEVICES)
    process: str | None = option(None, _PROCESS, DEVICES)
    keep: Positive = option(3, "number of checkpoints to keep", SAVING)
    track: Tracked = option(
        (), "also log metrics to tensorboard (in the run directory) or wandb:PROJECT, separated by commas", SAVING
    )
    max_shard_size: Text = option("5GB", _SHARD, IO)
    overwrite: bool = option(False, _OVERWRITE, IO)

    @property
    def wandb(self) -> str | None:
        """Project name in Weights & Biases."""
        return next((target.partition(":")[2] for target in self.track if target.startswith("wandb:")), None)


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class UpscaleConfig:
    """Configuration of ``tli-jax upscale``. Options of the methods are ``None`` unless given."""

    model: PathText = option(
        "", "folder, Hub id, or 'embedded' for the small base in the package", IO, shown="required"
    )
    output: PathText | None = option(None, "folder to write; not needed with --plan-only", IO, shown="required")
    revision: str | None = option(None, _REVISION, IO)
    method: Method = option("tli", "growth method", GROWTH, choices=METHODS)
    every: Whole | None = option(None, "tli, average: inject after every K base layers", GROWTH, shown="4")
    init: Init | None = option(None, "tli: initialiser of injected layers", GROWTH, choices=INITS, shown="identity")
    scale: Number | None = option(
        None, "tli: factor on the residual outputs, with init scaled, noise, random, transport or predictor", GROWTH
    )
    after: Layers | None = option(None, "inject after these base layers instead, e.g. 3,7,11", GROWTH)
    remainder: Literal["allow", "error"] | None = option(
        None, "tli: allow a number of layers that is not a multiple of K, or refuse it", GROWTH, shown="allow"
    )
    drop: Whole | None = option(
        None, "dus: layers removed from the end of the first half and the start of the second", GROWTH, shown="L/4"
    )
    groups: Whole | None = option(
        None, "llama_pro: number of groups, a divisor of L", GROWTH, shown="the divisor nearest to L/4"
    )
    block: Whole | None = option(None, "midas, lidas: layers in the repeated block", GROWTH, shown="⌈L/4⌉")
    count: Whole | None = option(None, "adept: number of least important layers to duplicate", GROWTH, shown="⌈L/4⌉")
    copies: Whole | None = option(
        None, "tli, llama_pro, interpose: injected layers at each position", GROWTH, shown="1"
    )
    times: Whole | None = option(None, "stack: how often the layers are repeated", GROWTH, shown="2")
    layers: Text | None = option(None, "custom: the grown layers, e.g. '0-3, 3*0, 4-7, 7*0.5, 8-15'", GROWTH)
    seed: Whole | None = option(None, "tli, lesa, experts: random seed", GROWTH, shown="0")
    noise_ratio: Number | None = option(
        None,
        "noise relative to the root mean square of a tensor; upcycle drop: fraction that is resampled",
        GROWTH,
        shown="0.01; 0.5 for drop",
    )
    experts: Whole | None = option(
        None, "turn each feed-forward into this many experts, with any method", EXPERTS, shown="8 with moe"
    )
    top_k: Whole | None = option(None, "experts per token", EXPERTS, shown="2")
    granularity: Whole | None = option(None, "split each expert into this many smaller ones", EXPERTS, shown="1")
    upcycle: Upcycle | None = option(None, "initialiser of the experts", EXPERTS, choices=UPCYCLES, shown="copy")
    router_std: Number | None = option(
        None, "standard deviation of the router's initial weights", EXPERTS, shown="the model's initializer_range"
    )
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
    json: bool = option(False, _JSON, IO)
    overwrite: bool = option(False, _OVERWRITE, IO)
    max_shard_size: Text = option("5GB", _SHARD, IO)
    train: TrainConfig | None = option(None, "section: continued pretraining of the grown model", IO)


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class PreflightConfig(UpscaleConfig):
    """Configuration of ``tli-jax preflight``: check what ``upscale`` and ``train`` would do, possibly for another
    machine."""

    topology: str | None = option(
        None, "TPU slice to compile for, e.g. v5p-64 or v5p:2x4x4", CHECKS, shown="the devices of this machine"
    )
    slices: Positive = option(1, "number of such slices", CHECKS)
    search: bool = option(False, "find the largest batch per device and the cheapest remat that fit", CHECKS)
    strict: bool = option(False, "fail if a check cannot be made here", CHECKS)


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class EvaluateConfig(Reading):
    """Configuration of ``tli-jax evaluate``."""

    model: PathText = option("", "folder, Hub id, or 'embedded'", IO, shown="required")
    revision: str | None = option(None, _REVISION, IO)
    tasks: Paths = option((), _TASKS, DATA)
    shots: NotNegative = option(
        0, "solved examples before each question, from train.jsonl beside the task's file", DATA
    )
    seed: NotNegative = option(0, "seed that selects the examples", DATA)
    limit: Positive | None = option(
        None, "evaluate only the first N questions of each task and windows of each text", DATA, shown="all"
    )
    json: bool = option(False, _JSON, OUTPUT)
    distributed: bool = option(False, _DISTRIBUTED, DEVICES)
    process: str | None = option(None, _PROCESS, DEVICES)


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class GenerateConfig:
    """Configuration of ``tli-jax generate``."""

    model: PathText = option("", "folder (base, grown or trained), Hub id, or 'embedded'", IO, shown="required")
    revision: str | None = option(None, _REVISION, IO)
    compare_to: PathText | None = option(None, "a second model that continues the same prompt", IO)
    prompt: str = option("", "text to continue", IO, shown="required")
    chat: bool | None = option(
        None, "wrap the prompt in the model's chat template", SAMPLING, shown="yes if the model has one"
    )
    max_new_tokens: Positive = option(64, "number of tokens to generate, at most", SAMPLING)
    temperature: Amount = option(0.0, "sampling temperature; 0 is greedy", SAMPLING)
    seed: NotNegative = option(0, "random seed, with a temperature above 0", SAMPLING)
    json: bool = option(False, _JSON, OUTPUT)


# The paper's method with two readings of its initialiser (zero outputs, plain copies) and with the one that trains
# fastest, and the paper's two rivals. llama_pro would make the same layers as tli:identity at this size.
DEFAULT_CONTENDERS: tuple[dict[str, Any], ...] = (
    *({"method": "tli", "init": init} for init in ("identity", "half", "copy")),
    {"method": "dus"},
    {"method": "moe"},
)


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class CompareConfig(Recipe):
    """Configuration of ``tli-jax compare``: grow a base with several methods and train each in the same way."""

    model: PathText = option("", "the base: folder, Hub id, or 'embedded'", IO, shown="required")
    revision: str | None = option(None, _REVISION, IO)
    output: PathText = option("", "folder for results, models and runs; resumed if it exists", IO, shown="required")
    methods: Contenders = option(
        DEFAULT_CONTENDERS,
        "growth methods, METHOD or METHOD:INIT (moe:UPCYCLE), separated by commas; in YAML also {method, name, …} with"
        " any option of the method",
        COMPARISON,
        shown="tli:identity,tli:half,tli:copy,dus,moe",
    )
    every: Positive = option(
        4, "K: every method grows to the size of tli with this K, or the next smaller size it can reach", COMPARISON
    )
    seeds: Seeds = option(3, "runs per method, each with its own data order and random weights", COMPARISON)
    only: Only = option(("all", "injected"), "trainable layers: all, injected, or both for one run of each", COMPARISON)
    steps: NotNegative = option(1000, "optimizer steps per run; 0 measures the models before training only", OPTIMIZER)
    baselines: bool = option(
        True,
        "also train three baselines: the base, the same number of its old layers, the grown size from random weights",
        COMPARISON,
    )
    old_text: Sources = option(
        (), "text of the base's own domain, to measure forgetting; or 'embedded' for held-out modules", COMPARISON
    )
    tasks: Paths = option((), _TASKS, COMPARISON)

    @property
    def recipe(self) -> TrainConfig:
        """The training configuration shared by all runs; keys of a single run are not set."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)}
        values["steps"] = max(self.steps, 1)
        return TrainConfig(**values)
