"""Configurations of prepare, evaluate, generate and compare. Every field is a key and a flag (see ``cli.parse``)."""

import dataclasses
import math
from typing import Annotated, Any

import pydantic
from pydantic.dataclasses import dataclass

from tli_jax.cli.keys import (
    COMPARISON,
    DATA,
    DEVICES,
    DISTRIBUTED,
    IO,
    JSON,
    OPTIMIZER,
    OUTPUT,
    OVERWRITE,
    PROCESS,
    REVISION,
    SAMPLING,
    SCAN,
    TASKS,
)
from tli_jax.cli.train_config import Reading, Recipe, TextConfig, TrainConfig
from tli_jax.cli.values import (
    Amount,
    Amounts,
    Contenders,
    Degrees,
    FloatType,
    Layers,
    NotNegative,
    Only,
    Paths,
    PathText,
    Positive,
    Seeds,
    Sources,
    Text,
    Window,
    Words,
    all_of,
    option,
)
from tli_jax.growth.doubling import BLOCKS, DOUBLINGS


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class PrepareConfig(TextConfig):
    """Configuration of ``tli-jax prepare``. The other keys must be those of the run."""

    model: PathText = option(
        "", "folder, GGUF file, Hub id, or 'embedded'; only its tokenizer is read", IO, shown="required"
    )
    revision: str | None = option(None, REVISION, IO)
    text: Sources = option((), "files or folders to tokenize, separated by commas, or 'embedded'", IO, shown="required")
    output: PathText = option("", "folder to write", IO, shown="required")
    workers: Positive | None = option(None, "processes that tokenize", DEVICES, shown="one per core")
    max_shard_size: Text = option("1GiB", "size limit of the token ids in a file", IO)
    overwrite: bool = option(False, OVERWRITE, IO)


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class EvaluateConfig(Reading):
    """Configuration of ``tli-jax evaluate``."""

    model: PathText = option("", "folder, GGUF file, Hub id, or 'embedded'", IO, shown="required")
    revision: str | None = option(None, REVISION, IO)
    tasks: Paths = option((), TASKS, DATA)
    shots: NotNegative = option(
        0, "solved examples before each question, from train.jsonl beside the task's file", DATA
    )
    seed: NotNegative = option(0, "seed that selects the examples", DATA)
    limit: Positive | None = option(
        None, "evaluate only the first N questions of each task and windows of each text", DATA, shown="all"
    )
    json: bool = option(False, JSON, OUTPUT)
    distributed: bool = option(False, DISTRIBUTED, DEVICES)
    process: str | None = option(None, PROCESS, DEVICES)


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class GenerateConfig:
    """Configuration of ``tli-jax generate``."""

    model: PathText = option(
        "", "folder (base, grown or trained), GGUF file, Hub id, or 'embedded'", IO, shown="required"
    )
    revision: str | None = option(None, REVISION, IO)
    compare_to: PathText | None = option(None, "a second model that continues the same prompt", IO)
    prompt: str = option("", "text to continue", IO, shown="required")
    chat: bool | None = option(
        None, "wrap the prompt in the model's chat template", SAMPLING, shown="yes if the model has one"
    )
    max_new_tokens: Positive = option(64, "number of tokens to generate, at most", SAMPLING)
    temperature: Amount = option(0.0, "sampling temperature; 0 is greedy", SAMPLING)
    seed: NotNegative = option(0, "random seed, with a temperature above 0", SAMPLING)
    json: bool = option(False, JSON, OUTPUT)


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

    model: PathText = option("", "the base: folder, GGUF file, Hub id, or 'embedded'", IO, shown="required")
    revision: str | None = option(None, REVISION, IO)
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
    seeds: Seeds = option(
        5, "runs per method, each with its own data order and random weights; fewer than 5 decide nothing", COMPARISON
    )
    learning_rates: Amounts = option(
        (),
        "peak learning rates to choose from, for each contender by its loss with a seed that is used for nothing else",
        COMPARISON,
        shown="learning_rate for all",
    )
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
    tasks: Paths = option((), TASKS, COMPARISON)
    keep_checkpoints: bool = option(
        True, "keep the trained models; otherwise, delete the checkpoints of a run once it is measured", COMPARISON
    )

    @property
    def recipe(self) -> TrainConfig:
        """The training configuration shared by all runs; keys of a single run are not set.

        Validation and the old text read no more tokens than a run trains on.
        """
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)}
        values["steps"] = max(self.steps, 1)
        if self.steps:
            readings = math.ceil(self.steps / self.validate_every) + bool(self.old_text)
            values["validation_batches"] = min(self.validation_batches, max(1, self.steps // readings))
        return TrainConfig(**values)


# What a scan can measure: each layer left out, doubled in five ways, and each block of layers run twice in two ways.
SCANNED = ("bypass", *DOUBLINGS, *BLOCKS)
Scanned = Annotated[Words, all_of(SCANNED)]


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class ScanConfig:
    """Configuration of ``tli-jax scan``: what each layer is worth, and what doubling it costs."""

    model: PathText = option("", "the base: folder, GGUF file, Hub id, or 'embedded'", IO, shown="required")
    revision: str | None = option(None, REVISION, IO)
    text: PathText = option("", "held-out UTF-8 text, or 'embedded'", IO, shown="required")
    old_text: PathText | None = option(None, "a second text, such as the base's own domain, or 'embedded'", IO)
    output: PathText = option("", "folder for the results; an interrupted scan resumes", IO, shown="required")
    overwrite: bool = option(False, "start over if the folder holds a scan of another base, text or dtype", IO)
    what: Scanned = option(
        SCANNED, "what to measure, separated by commas; blocks take L(L+1)/2 plans each", SCAN, choices=SCANNED
    )
    grow_to: Layers = option((), "search the best plans with these numbers of layers, e.g. 36,42", SCAN)
    tokens: Positive = option(1024, "tokens of each text, from its start", SCAN)
    window: Window = option(512, "tokens per sequence", SCAN)
    dtype: FloatType = option("float32", "dtype of weights and activations", DEVICES)
    mesh: Degrees = option(
        {}, "devices along each axis, e.g. data=2,fsdp=4; -1 takes the rest", DEVICES, shown="fsdp=-1"
    )
    distributed: bool = option(False, DISTRIBUTED, DEVICES)
    process: str | None = option(None, PROCESS, DEVICES)
