"""The typed description of a run: the only reader of YAML, and where command-line flags come from.

Every key of the file is a flag and every flag is a key: ``every: 4`` is ``--every 4``, ``max_shard_size`` is
``--max-shard-size``, and ``steps`` in the section ``train`` is ``--train.steps``. Flags win over the file. Whatever is
not known is refused, with the nearest name.
"""

import dataclasses
from typing import Any, Literal, get_args

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
    option,
)

Method = Literal[
    "tli",
    "dus",
    "llama_pro",
    "stack",
    "interpose",
    "slayer",
    "average",
    "opt_deus",
    "lesa",
    "midas",
    "lidas",
    "adept",
    "moe",
    "custom",
]
Init = Literal[
    "identity",
    "copy",
    "scaled",
    "half",
    "average",
    "average_identity",
    "next_identity",
    "noise",
    "random",
    "transport",
    "predictor",
]

Upcycle = Literal["copy", "noise", "drop", "virtual_groups", "virtual_groups_published"]

_TASKS = "multiple choice: JSONL files, KoBEST's and other folders of them, separated by commas; or 'embedded'"


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Reading:
    """How text becomes batches, and on which devices they run."""

    text: Sources = option((), "files or folders to read, separated by commas, in YAML {path, weight}; or 'embedded'")
    separator: Separator = option(
        None, r"plain text: what stands between documents, e.g. '\n'; by default a file is one document"
    )
    field: str = option("text", "JSONL, Parquet, datasets folders: the field that holds the text")
    bos: bool = option(True, "put BOS before each document, if the model has one")
    eos: bool = option(True, "put EOS after each document, if the model has one")
    special_tokens: Literal["text", "parse"] = option(
        "text", "special tokens in a document, e.g. </s>: text like any other, or parse: their ids"
    )
    on_bad: Literal["refuse", "skip"] = option("refuse", "what to do with documents that cannot be read")
    isolate: bool = option(True, "attention stays within a document; no loss crosses documents either way")
    batch_size: BatchSize = option(8, "sequences a step, over all devices")
    sequence_length: Positive | None = option(None, "tokens a sequence (default: the model's context, 2048 at most)")
    dtypes: FloatTypes = option(
        {}, "of what trains, its first moment, and of activations: param=float32,moment=float32,compute=bfloat16"
    )
    attention: Literal["auto", "xla", "cudnn", "splash"] = option("auto", "auto, xla, cudnn (GPU) or splash (TPU)")
    mesh: Degrees = option(
        {}, "devices an axis, e.g. data=2,fsdp=4,expert=1,tensor=1; -1 takes the rest (default fsdp=-1)"
    )

    @property
    def compute_dtype(self) -> FloatType:
        """Of activations and matrix products."""
        return self.dtypes.get("compute", "bfloat16")


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Recipe(Reading):
    """How a model is trained on, whichever it is: on what, how long, by what optimizer, on which devices."""

    validation_text: Sources = option((), "the same, for validation; by default the end of each source is kept out")
    validation_fraction: Fraction = option(0.05, "how much of each source is kept out, without validation_text")
    steps: Positive = option(1000, "optimizer steps in all")
    seed: NotNegative = option(0, "seed of the order of the data")
    outer: str | None = option(
        None, "tensors outside the layers that train: all, none, or of embed_tokens,norm,lm_head (default as only all)"
    )
    learning_rate: Rates = option(
        {"all": 1e-4}, "peak learning rate, and another one for some groups: 1e-4,injected=1e-3,kept=1e-5,outer=0"
    )
    warmup: Steps = option({"all": 0}, "steps from 0 to the peak, and others for some groups: 100,kept=500")
    schedule: Literal["cosine", "wsd", "constant"] = option("cosine", "how the rate falls: cosine, wsd or constant")
    decay_fraction: Fraction = option(0.2, "wsd: the last share of all steps, over which the rate falls in a line")
    final_fraction: Fraction = option(0.1, "what is left of the peak at the end, with cosine and wsd")
    optimizer: Literal["adamw", "adafactor", "lion", "muon"] = option("adamw", "adamw, adafactor, lion or muon")
    adam: Adam = option({}, "decays of the moments, and what is added to the denominator: b1=0.9,b2=0.95,eps=1e-8")
    weight_decay: Amount = option(0.1, "decoupled; of layers' matrices and the head, not of norms and embedding")
    clip_norm: Amount = option(1.0, "largest global norm of the gradient; 0 for none")
    remat: Literal["none", "dots", "full"] = option(
        "full", "what is computed again in the backward pass: none, all but matrix products (dots), full"
    )
    grad_accum_steps: NotNegative = option(
        1, "parts into which a step's batch is cut, one after the other; 0: so many that a device has one sequence"
    )
    auxiliary: Auxiliary = option(
        {},
        "weights of what is added to the loss: z=0 (squared log of the softmax's denominator), balance=0.01 (experts)",
    )
    skip_limit: Positive = option(10, "bad steps in a row (loss not finite, a spike) that are skipped before it stops")
    spike: Amount = option(50.0, "a gradient this many times its running mean is a spike; 0 for none")
    save_every: Positive = option(500, "steps between checkpoints; the last step is always saved")
    validate_every: Positive = option(100, "steps between validations; also before the first step and after the last")
    validation_batches: Positive = option(20, "batches a validation, at most")

    @property
    def param_dtype(self) -> FloatType:
        """Of the parameters that train."""
        return self.dtypes.get("param", "float32")

    @property
    def moment_dtype(self) -> FloatType:
        """Of the first moment."""
        return self.dtypes.get("moment", "float32")

    @property
    def z_loss(self) -> float:
        """Weight of the squared log of the softmax's denominator."""
        return self.auxiliary.get("z", 0.0)

    @property
    def balance_loss(self) -> float:
        """Weight of how unevenly experts are used."""
        return self.auxiliary.get("balance", 0.01)


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class TrainConfig(Recipe):
    """What ``python -m tli_jax.train`` is to do: continued pretraining."""

    model: PathText = option("", "what to start from: folder (grown or not), run folder, hub id or 'embedded'")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    run: PathText = option("", "run folder: checkpoints, metrics, configuration; what is there is gone on with")
    export: PathText | None = option(None, "Hugging Face folder to write at the end")
    export_only: bool = option(False, "do not train: export the newest checkpoint of the run")
    only: str = option("all", "layers that train: all, injected, last_n(N) or layers(0,3,7-9)")
    distributed: bool = option(False, "several processes, which find each other on Cloud TPU, GKE and Slurm")
    process: str | None = option(None, "this process of several, elsewhere: INDEX/COUNT@HOST:PORT of process 0")
    keep: Positive = option(3, "checkpoints that are kept")
    track: Tracked = option((), "where metrics go too: tensorboard (in the run folder), wandb:PROJECT")
    max_shard_size: Text = option("5GB", "largest safetensors file of the export")
    overwrite: bool = option(False, "replace an export that exists, once the new one is complete")

    @property
    def wandb(self) -> str | None:
        """A project of Weights & Biases."""
        return next((one.partition(":")[2] for one in self.track if one.startswith("wandb:")), None)


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class UpscaleConfig:
    """What ``python -m tli_jax.upscale`` is to do. Options of the methods are ``None`` where not given."""

    model: PathText = option("", "folder, hub id, or 'embedded': the small base that the package carries")
    output: PathText | None = option(None, "folder to write; not needed with --plan-only")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    method: Method = option("tli", f"one of {', '.join(get_args(Method))} (default tli)")
    every: Whole | None = option(None, "tli, average: inject after every K base layers (default 4)")
    init: Init | None = option(
        None, f"tli: how an injected layer starts, one of {', '.join(get_args(Init))} (default identity)"
    )
    scale: Number | None = option(None, "tli: factor on residual outputs, with init scaled or one that computes")
    after: Layers | None = option(None, "positions by hand: base layers after which is injected, e.g. 3,7,11")
    remainder: Literal["allow", "error"] | None = option(None, "tli: whether K may leave layers over (default allow)")
    drop: Whole | None = option(
        None, "dus: layers dropped from the end of one half and the start of the other (default L/4)"
    )
    groups: Whole | None = option(None, "llama_pro: number of groups, a divisor of L")
    block: Whole | None = option(None, "midas, lidas: layers of the block that is repeated (default ⌈L/4⌉)")
    count: Whole | None = option(None, "adept: layers that are doubled, those that matter least (default ⌈L/4⌉)")
    experts: Whole | None = option(None, "moe, or any method: experts of a layer, of the base's size (default 8)")
    top_k: Whole | None = option(None, "experts: how many a token goes through (default 2)")
    granularity: Whole | None = option(None, "experts: into how many smaller ones each is cut (default 1)")
    upcycle: Upcycle | None = option(None, f"experts: how they start, {', '.join(get_args(Upcycle))} (default copy)")
    router_std: Number | None = option(None, "experts: N(0, std) of the router (default the model's initializer_range)")
    copies: Whole | None = option(None, "tli, llama_pro, interpose: injected layers at each position (default 1)")
    times: Whole | None = option(None, "stack: how many times the trunk (default 2)")
    layers: Text | None = option(None, "custom: the grown layers, e.g. '0-3, 3*0, 4-7, 7*0.5, 8-15'")
    seed: Whole | None = option(None, "tli, lesa, experts: seed of what is drawn (default 0)")
    noise_ratio: Number | None = option(
        None,
        "noise as a share of a tensor's root mean square (default 0.01); upcycle drop: share drawn anew (default 0.5)",
    )
    text: PathText | None = option(
        None, "UTF-8 text for the proof, and for adept; by default the one that the package carries"
    )
    proof: bool = option(True, "run base and grown model and compare every logit")
    sample: str | None = option(None, "prompt to continue with base and grown model at the end (greedy)")
    plan_only: bool = option(False, "read headers and configuration only, print the plan, write nothing")
    json: bool = option(False, "JSON alone on stdout, everything else on stderr")
    overwrite: bool = option(False, "replace an output that exists, once the new one is complete")
    max_shard_size: Text = option("5GB", "largest safetensors file")
    allow_nonfinite: bool = option(False, "go on when weights are NaN or Inf")
    shape: Shape = option(
        None, "what the model is, e.g. llama3.1-8b, in YAML also the keys of a config.json; must be so where it is here"
    )
    train: TrainConfig | None = option(None, "section: continued pretraining of what was grown, see tli_jax.train")


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class PreflightConfig(UpscaleConfig):
    """What ``python -m tli_jax.preflight`` is to check: what ``upscale`` would do, on a machine that may be another."""

    topology: str | None = option(
        None, "TPU slice to compile for, e.g. v5p-64 or v5p:2x4x4 (default: the devices that are here)"
    )
    slices: Positive = option(1, "how many such slices")
    search: bool = option(False, "find the largest batch a device and the cheapest remat that fit")
    strict: bool = option(False, "what cannot be checked here is an error")


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class EvaluateConfig(Reading):
    """What ``python -m tli_jax.evaluate`` is to measure."""

    model: PathText = option("", "folder, hub id, or 'embedded'")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    tasks: Paths = option((), _TASKS)
    shots: NotNegative = option(0, "solved questions in front of each, from the train.jsonl beside a task's file")
    seed: NotNegative = option(0, "seed of which these are")
    json: bool = option(False, "JSON alone on stdout, everything else on stderr")
    distributed: bool = option(False, "several processes, which find each other on Cloud TPU, GKE and Slurm")
    process: str | None = option(None, "this process of several, elsewhere: INDEX/COUNT@HOST:PORT of process 0")


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class CompareConfig(Recipe):
    """What ``python -m tli_jax.compare`` is to do: several growths of one base, trained alike."""

    model: PathText = option("", "the base: folder, hub id, or 'embedded'")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    output: PathText = option("", "folder for results, models and runs; what is there is gone on with")
    methods: Contenders = option(
        (),
        "ways to grow, METHOD or METHOD:INIT (moe:UPCYCLE) with commas between; in YAML also {method, name, …} with any"
        " option of the method",
    )
    every: Positive = option(4, "K: all are grown to the size of tli with this K, or to the next below that they reach")
    seeds: Seeds = option(3, "runs of each, on data in another order and with other draws, from seed on")
    only: Only = option(("all", "injected"), "what trains: all, injected, or all,injected for one run of each")
    steps: NotNegative = option(1000, "optimizer steps of each run; 0 for the losses before any training alone")
    baselines: bool = option(
        True, "train three others too: the base, as many of its old layers alone, the grown size from random weights"
    )
    old_text: Sources = option(
        (),
        "text of the domain that the base comes from, for forgetting; or 'embedded': modules held out of its training",
    )

    tasks: Paths = option((), _TASKS)

    @property
    def recipe(self) -> TrainConfig:
        """How each model is trained; whatever is of one run alone is not set."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)}
        values["steps"] = max(self.steps, 1)
        return TrainConfig(**values)
