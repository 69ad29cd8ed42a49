"""The typed description of a run: the only reader of YAML, and where command-line flags come from.

Every key of the file is a flag and every flag is a key: ``every: 4`` is ``--every 4``, ``max_shard_size`` is
``--max-shard-size``, and ``steps`` in the section ``train`` is ``--train.steps``. Flags win over the file. Whatever is
not known is refused, with the nearest name.
"""

import argparse
import dataclasses
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import pydantic
import yaml
from pydantic.dataclasses import dataclass

from tli_jax.cli.frame import Parser
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
from tli_jax.errors import MissingInputError, UsageError, nearest

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


Config = TypeVar("Config")

_LARGEST_FILE = 2**17  # bytes of YAML, which takes seconds to read
_SHOWN = 5  # problems in a message
_LONGEST = 100  # characters of a value in a message


def parse(kind: type[Config], program: str, description: str, arguments: Sequence[str]) -> Config:
    """A configuration from ``--config FILE.yaml`` and flags over it.

    A file that describes a growth and, in its section ``train``, what comes after, serves for that section alone too:
    the model is then what the growth writes. And one that describes training alone serves for a preflight.

    Raises:
        UsageError: an unknown key or flag, or a wrong value.
        MissingInputError: the file is not there.
    """
    parser = Parser(prog=program, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="YAML file; every flag below is a key in it, but for --debug")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    switches = ["--config", "--debug"]
    for name, field in _flat_fields(kind).items():
        # A flag of argparse's own for yes/no; anything else stays text, for the types above to read.
        action: Any = argparse.BooleanOptionalAction if field.type is bool else "store"
        switches.append(_flag(name))
        parser.add_argument(switches[-1], dest=name, action=action, help=field.metadata["help"].replace("%", "%%"))
    given, rest = parser.parse_known_args(arguments)
    if rest:
        word = next((word for word in rest if word.startswith("-")), rest[0])
        raise UsageError(f"{word} is not known{nearest(word, switches)}; see --help")
    flags = vars(given)
    flags.pop("debug", None)  # for the frame of a command, which looks for the word itself
    for name, value in flags.items():
        if isinstance(value, str) and not _is_unicode(value):
            raise UsageError(f"command line: {name} is {value!r}: not UTF-8")
    path = flags.pop("config", None)
    values = _read_yaml(Path(path).expanduser()) if path else {}
    if kind is TrainConfig and isinstance(values.get("train"), dict):
        values = {"model": values.get("output", "")} | values["train"]
    elif kind is PreflightConfig and "run" in values:  # of a run without growth
        values = {"model": values.get("model", ""), "train": values}
    return _validate(kind, values, flags, path)


def to_yaml(config: Any) -> str:
    """A configuration as the YAML that ``parse`` reads, every key in it."""
    values = plain(dataclasses.asdict(config))
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """In quotes, with escapes, what is not printable: else PyYAML turns U+0085 and U+2028 into line breaks."""

    def represent_str(self, data: str) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def from_yaml(kind: type[Config], path: Path) -> Config:
    """Read what ``to_yaml`` wrote.

    Raises:
        UsageError, MissingInputError: see ``parse``.
    """
    return _validate(kind, _read_yaml(path), {}, str(path))


def growth_config(values: dict[str, Any], where: str) -> UpscaleConfig:
    """A growth from keys and values.

    Raises:
        UsageError: an unknown key, or a wrong value; says ``where``.
    """
    return _validate(UpscaleConfig, values, {}, where)


def difference(earlier: Any, now: Any, may_change: Sequence[str]) -> str:
    """What differs between two configurations, but for keys that may; each key with both values."""
    before, after = dataclasses.asdict(earlier), dataclasses.asdict(now)
    differing = [key for key in after if key not in may_change and before[key] != after[key]]
    return "; ".join(f"{key} was {before[key]!r}, is {after[key]!r}" for key in differing)


def plain(value: Any) -> Any:
    """Of mappings and lists alone, as YAML and JSON give it back."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def _sections(kind: Any) -> dict[str, Any]:
    """Keys of a configuration that are configurations themselves."""
    return {
        field.name: part
        for field in dataclasses.fields(kind)
        for part in get_args(field.type)
        if isinstance(part, type) and dataclasses.is_dataclass(part)
    }


def _flat_fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    """Every key, those of a section by a dotted name; first a configuration's own, then those that it shares."""
    sections = _sections(kind)
    fields = sorted(dataclasses.fields(kind), key=lambda field: field.name not in vars(kind)["__annotations__"])
    flat = {field.name: field for field in fields if field.name not in sections}
    for name, part in sections.items():
        flat |= {f"{name}.{key}": field for key, field in _flat_fields(part).items()}
    return flat


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Loader(yaml.SafeLoader):
    """YAML with what a configuration needs: text, numbers, yes and no, null, lists and mappings.

    No aliases, which make a kilobyte into gigabytes; no key twice, where one would win silently; and no numbers but
    decimal ones: 0123, 1:30 and 2024-01-01 stay text.
    """

    yaml_implicit_resolvers: ClassVar = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    yaml_constructors: ClassVar = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"alias *{event.anchor}: write it out", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        if not _is_unicode(text):
            raise yaml.MarkedYAMLError(problem="half a surrogate pair", problem_mark=node.start_mark)
        return text

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found: dict[Any, Any] = {}
        if not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(problem="must be keys and values", problem_mark=node.start_mark)
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | None):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
            if key in found:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is there twice", problem_mark=key_node.start_mark)
            found[key] = self.construct_object(value_node, deep=deep)
        return found


# Nothing is a number or a date here that is none to PyYAML, which writes configurations.
for _tag, _form, _starts in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"0|-?[1-9][0-9]*", "-0123456789"),
    (
        "float",
        r"(?:[-+]?[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_form})$"), list(_starts))


def _is_unicode(text: str) -> bool:
    """Whether it can be written anywhere. The system gives bytes of arguments that are not UTF-8 as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingInputError(f"{path}: no such configuration file")
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
        if len(data) > _LARGEST_FILE:
            raise ValueError(f"is larger than {_LARGEST_FILE:,} bytes")
        content = yaml.load(data.decode("utf-8-sig"), _Loader)  # a safe loader
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:
        raise UsageError(f"{path}: is not YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must hold keys and values, is {type(content).__name__}")
    return content


def _validate(kind: type[Config], values: dict[str, Any], flags: dict[str, Any], path: str | None) -> Config:
    merged = dict(values)
    for name, value in flags.items():
        section, dot, key = name.rpartition(".")
        if not dot:
            merged[key] = value
        elif isinstance(merged.get(section) or {}, dict):
            merged[section] = (merged.get(section) or {}) | {key: value}
    try:
        return pydantic.TypeAdapter(kind).validate_python(merged)
    except pydantic.ValidationError as error:
        problems = []
        for found in error.errors():
            parts = [str(part) for part in found["loc"]]
            key = ".".join(parts[: 1 + (parts[0] in _sections(kind))])
            where = "command line" if key in flags else path
            if found["type"] in ("unexpected_keyword_argument", "extra_forbidden") and len(parts) <= 1 + key.count("."):
                problems.append(f"{where}: key {key!r} is not known{nearest(key, _flat_fields(kind))}")
            else:
                problems.append(f"{where}: {key} is {_shorten(found['input'])}: {found['msg']}")
        more = f"; and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        raise UsageError("; ".join(problems[:_SHOWN]) + more) from None


def _shorten(value: Any) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _LONGEST
    return short.repr(value)
