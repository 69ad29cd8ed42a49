"""Configurations from flags and YAML files, and the messages for invalid ones."""

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tli_jax.cli.config import CompareConfig
from tli_jax.cli.growth_config import UpscaleConfig
from tli_jax.cli.parse import from_yaml, parse
from tli_jax.cli.train_config import TrainConfig
from tli_jax.cli.values import Source
from tli_jax.cli.yaml_file import to_yaml
from tli_jax.errors import MissingInputError, UsageError

# The section has its own tests below.
FIELDS = {field.name: field for field in dataclasses.fields(UpscaleConfig) if field.name != "train"}


def read(*arguments: str) -> UpscaleConfig:
    return parse(UpscaleConfig, "program", "Description.", arguments)


@pytest.fixture
def file(tmp_path: Path):
    """Parse YAML text and flags that override it."""

    def read_file(text: str, *arguments: str) -> UpscaleConfig:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return read("--config", str(tmp_path / "run.yaml"), *arguments)

    return read_file


def test_defaults() -> None:
    assert read() == UpscaleConfig()
    config = UpscaleConfig()
    assert (config.method, config.proof, config.overwrite, config.max_shard_size) == ("tli", True, False, "5GB")
    # The methods set the defaults of their own options.
    for name in ("every", "init", "scale", "after", "drop", "groups", "copies", "times", "layers", "seed"):
        assert getattr(config, name) is None


# A value of each key as a flag, in YAML, and as parsed. A key that is missing here fails the test.
VALUES: dict[str, tuple[str, str, object]] = {
    "model": ("a/b", "a/b", "a/b"),
    "output": ("out", "out", "out"),
    "revision": ("v1", "v1", "v1"),
    "method": ("dus", "dus", "dus"),
    "every": ("2", "2", 2),
    "init": ("half", "half", "half"),
    "scale": ("0.5", "0.5", 0.5),
    "after": ("3,7,11", "[3, 7, 11]", (3, 7, 11)),
    "positions": ("inner", "inner", "inner"),
    "scan": ("scan.json", "scan.json", "scan.json"),
    "plan": ("plan.json", "plan.json", "plan.json"),
    "remainder": ("error", "error", "error"),
    "drop": ("8", "8", 8),
    "groups": ("4", "4", 4),
    "block": ("3", "3", 3),
    "count": ("2", "2", 2),
    "experts": ("4", "4", 4),
    "top_k": ("1", "1", 1),
    "granularity": ("2", "2", 2),
    "upcycle": ("drop", "drop", "drop"),
    "router_std": ("0.1", "0.1", 0.1),
    "copies": ("2", "2", 2),
    "times": ("3", "3", 3),
    "layers": ("0-3, 3*0", "0-3, 3*0", "0-3, 3*0"),
    "seed": ("-1", "-1", -1),
    "noise_ratio": ("1e-2", "0.01", 0.01),
    "text": ("t.txt", "t.txt", "t.txt"),
    "proof": ("--no-proof", "no", False),
    "sample": ("Es war", "Es war", "Es war"),
    "plan_only": ("--plan-only", "yes", True),
    "json": ("--json", "true", True),
    "overwrite": ("--overwrite", "true", True),
    "max_shard_size": ("500MiB", "500MiB", "500MiB"),
    "allow_nonfinite": ("--allow-nonfinite", "true", True),
    "shape": ("llama3.1-8b", "llama3.1-8b", "llama3.1-8b"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_key_is_a_flag(name: str, file) -> None:
    flag, in_yaml, meant = VALUES[name]
    wanted = dataclasses.replace(UpscaleConfig(), **{name: meant})
    arguments = [flag] if flag.startswith("--") else ["--" + name.replace("_", "-"), flag]
    assert read(*arguments) == wanted
    assert file(f"{name}: {in_yaml}") == wanted
    if not flag.startswith("--"):
        assert read(f"--{name.replace('_', '-')}={flag}") == wanted


def test_debug_is_a_flag_but_not_a_key(file) -> None:
    assert read("--debug") == UpscaleConfig()
    with pytest.raises(UsageError, match="'debug' is not known"):
        file("debug: yes")


def test_help_lists_every_key_of_upscale() -> None:
    help = subprocess.run(
        [sys.executable, "-m", "tli_jax.upscale", "--help"], capture_output=True, text=True, timeout=60
    )
    assert help.returncode == 0 and help.stderr == ""
    for name, field in FIELDS.items():
        assert "--" + name.replace("_", "-") in help.stdout
        assert field.metadata["help"].split()[0] in help.stdout


def test_flags_override_the_file(file) -> None:
    text = "model: base\noutput: out\nevery: 4\nproof: false\noverwrite: true\nafter: [1, 2]\n"
    config = file(text, "--every", "2", "--proof", "--no-overwrite", "--after", "5")
    assert config == UpscaleConfig(model="base", output="out", every=2, proof=True, overwrite=False, after=(5,))
    assert file(text).every == 4
    # The last of several flags wins.
    assert read("--every", "2", "--every", "3", "--no-proof", "--proof") == UpscaleConfig(every=3)


def test_lists() -> None:
    assert read("--after", "3,7,11").after == (3, 7, 11)
    assert read("--after", " 3, 7 ,11,").after == (3, 7, 11)
    assert read("--after", "3").after == (3,)
    assert read("--after", "").after == ()


def test_other_yaml_notations(file) -> None:
    assert file("after:\n- 3\n- 7\n").after == (3, 7)
    assert file("after: 3,7").after == (3, 7)
    assert file("layers: 0").layers == "0"  # a number in YAML, where text is expected
    assert file("max_shard_size: 5000000").max_shard_size == "5000000"
    assert file("output: null\nevery: ~") == UpscaleConfig()
    assert file("# a comment\n{}") == UpscaleConfig()
    assert file("scale: 1") == UpscaleConfig(scale=1.0)
    assert file("\ufeffoutput: 2024-01-31") == UpscaleConfig(output="2024-01-31")
    assert file("revision: 0123") == UpscaleConfig(revision="0123")
    assert file("output: 5") == UpscaleConfig(output="5")
    assert file("every: 010") == UpscaleConfig(every=10)
    assert file("output: grün/더 깊이") == UpscaleConfig(output="grün/더 깊이")


# Invalid flags and words of their messages.
FLAGS: dict[str, tuple[str, ...]] = {
    "--evry 2": ("--evry is not known", "did you mean --every?"),
    "--evry=2": ("--evry=2 is not known", "did you mean --every?"),
    "--max_shard_size 5GB": ("--max_shard_size is not known", "did you mean --max-shard-size?"),
    "--no-profe": ("--no-profe is not known",),
    "--over": ("--over is not known",),  # no abbreviations
    "-e 2": ("-e is not known",),
    "--output \udcff": (r"output is '\udcff': not UTF-8",),
    "stray": ("'stray' is not an option", "--help"),
    "--every": ("--every", "expected one argument"),
    "--overwrite=yes": ("--overwrite", "yes"),
    "--every two": ("every is 'two'", "must be a whole number"),
    "--every 2.5": ("every is '2.5'", "must be a whole number"),
    "--scale big": ("scale is 'big'", "must be a number"),
    "--after 1,x": ("after is 'x'", "must be a whole number"),
    "--method sliding": ("method is 'sliding'", "must be one of tli, dus"),
    "--init identty": ("init is 'identty'", "did you mean identity?"),
    "--remainder maybe": ("remainder is 'maybe'", "must be one of allow, error"),
    "--every x --drop y": ("every is 'x'", "drop is 'y'"),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_invalid_flags(flags: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(*flags.split())
    for text in FLAGS[flags]:
        assert text in str(caught.value)


TEXTS: dict[str, tuple[str, ...]] = {
    "evry: 2": ("key 'evry' is not known", "did you mean every?"),
    "max-shard-size: 5GB": ("key 'max-shard-size' is not known", "did you mean max_shard_size?"),
    "something: else": ("key 'something' is not known",),
    "evry: 2\nmetod: dus": ("did you mean every?", "did you mean method?"),
    "1: 2": ("1",),
    "every: yes": ("every is True", "must be a number, not a boolean"),
    "scale: no": ("scale is False", "must be a number, not a boolean"),
    "after: [1, true]": ("after is True", "must be a number, not a boolean"),
    "every: two": ("every is 'two'", "must be a whole number"),
    "every: 2.5": ("every is 2.5", "must be a whole number"),
    "every: [2]": ("every is [2]", "must be a whole number"),
    "every: {a: 2}": ("every is {'a': 2}", "must be a whole number"),
    "after: 3": ("after is 3", "must be a list"),
    "after: {3: 4}": ("after is {3: 4}", "must be a list"),
    "proof: 3": ("proof is 3", "must be yes or no"),
    "proof: maybe": ("proof is 'maybe'", "must be yes or no"),
    "proof: null": ("proof is None", "must be yes or no"),
    "model: 1.10": ("model is 1.1", "quotes"),
    "max_shard_size: 1.5": ("max_shard_size is 1.5", "quotes"),
    "text: ~nobodyatall/x": ("text is '~nobodyatall/x'", "no home directory"),
    'output: "a\\0b"': ("output is 'a\\x00b'", "NUL"),
    'output: "a\\ud800"': ("half a surrogate pair", "line 1"),
    "every: 2\ndrop: 3\nevery: 4": ("duplicate key 'every'", "line 3"),
    "shape: {a: 1, a: 1}": ("duplicate key 'a'",),
    "every: &a 2\ndrop: *a": ("alias *a", "line 2"),
    "<<: {every: 2}": ("key '<<' is not known",),
    "? [a, b]\n: c": ("a key must be a word",),
    "shape: !!map [1]": ("must be keys and values",),
    "every: !!int x": ("is not YAML",),
    "every: !!bool x": ("is not YAML",),
    "every: !!timestamp x": ("is not YAML",),
    "every: " + "9" * 5000: ("is not YAML",),
    "every: " + "9" * 30: ("every is 9999", "must be at most 2,147,483,647"),
    "train: {batch_size: 1000000000000}": ("train.batch_size is 1000000000000", "must be at most 2,147,483,647"),
    "#" * 2**20: ("larger than",),
    "output: yes": ("output is True", "must be text"),
    "layers: yes": ("layers is True", "must be text"),
    "layers: [0, 1]": ("layers is [0, 1]", "must be text"),
    "method: null": ("method is None",),
    "- every": ("must hold keys and values, is list",),
    "every": ("must hold keys and values, is str",),
    "": ("must hold keys and values, is NoneType",),
    "every: [2": ("is not YAML",),
    "every: 2\n\tdrop: 3": ("is not YAML",),
    "a: !!python/object/apply:os.system ['touch marker']": ("is not YAML",),
    "[" * 1500: ("is not YAML",),
    "every: 2\n--- \nevery: 3": ("is not YAML",),
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:30]))
def test_invalid_files(text: str, file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        file(text)
    assert str(caught.value).startswith(str(tmp_path / "run.yaml"))
    for words in TEXTS[text]:
        assert words in str(caught.value)
    assert not (tmp_path / "marker").exists()


def test_an_invalid_flag_is_not_blamed_on_the_file(file) -> None:
    with pytest.raises(UsageError, match=r"^command line: every is 'x'"):
        file("drop: 3", "--every", "x")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"nowhere\.yaml: no such configuration file"):
        read("--config", str(tmp_path / "nowhere.yaml"))
    with pytest.raises(MissingInputError, match="no such configuration file"):
        read("--config", str(tmp_path))
    (tmp_path / "latin").write_bytes("text: grün".encode("latin-1"))
    with pytest.raises(UsageError, match="latin: is not YAML"):
        read("--config", str(tmp_path / "latin"))


TRAIN_FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def read_train(*arguments: str) -> TrainConfig:
    return parse(TrainConfig, "program", "Description.", arguments)


def test_at_most_86_keys_in_all() -> None:
    """80, and: ``timeouts``; ``verify``, whether 100 GB are hashed at the start; ``grow``, with the keys of upscale;
    ``positions``, ``scan`` and ``plan``, which use the results of a scan."""
    assert len(FIELDS) + len(TRAIN_FIELDS) <= 86


def test_section_keys_are_dotted_flags(file) -> None:
    config = file(
        "model: base\ntrain:\n  steps: 7\n  only: injected\n", "--train.only", "all", "--train.mesh", "fsdp=4"
    )
    assert config.train == TrainConfig(steps=7, only="all", mesh={"fsdp": 4})
    assert file("model: base").train is None
    assert file("model: base", "--no-train.bos").train == TrainConfig(bos=False)


def test_a_file_with_a_train_section_also_configures_train(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: base\noutput: grown\ntrain:\n  run: r\n  steps: 7\n", encoding="utf-8")
    config = read_train("--config", str(tmp_path / "run.yaml"), "--steps", "8")
    assert config == TrainConfig(model="grown", run="r", steps=8)


def test_sources() -> None:
    assert read_train("--text", "a.txt,b.jsonl").text == (Source("a.txt"), Source("b.jsonl"))
    config = pydantic.TypeAdapter(TrainConfig).validate_python({"text": [{"path": "a", "weight": 3}, "b"]})
    assert config.text == (Source("a", 3.0), Source("b"))


def test_pairs_and_line_breaks() -> None:
    config = read_train("--mesh", "data=2, fsdp=-1", "--learning-rate", "1e-4,injected=1e-3, outer=0")
    assert config.mesh == {"data": 2, "fsdp": -1}
    assert config.learning_rate == {"all": 1e-4, "injected": 1e-3, "outer": 0.0}
    assert read_train("--separator", r"\n").separator == "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--stps", "3"), "--stps is not known, did you mean --steps?"),
        (("--mesh", "fsdp"), "must be name=value, separated by commas"),
        (("--mesh", "fdsp=2"), "mesh is 'fdsp', must be one of data, fsdp, expert, tensor, did you mean fsdp?"),
        (("--steps", "0"), "steps is '0'"),
        (("--optimizer", "adam"), "optimizer is 'adam'"),
        (("--learning-rate", "-1"), "learning_rate is '-1'"),
        (("--learning-rate", "nan"), "learning_rate is 'nan'"),
        (("--validation-fraction", "2"), "validation_fraction is '2'"),
        (("--learning-rate", "injected=1e-3"), "must have a value for all"),
        (("--learning-rate", "1e-3,inject=1e-3"), "learning_rate is 'inject'"),
        (("--dtypes", "compute=float16"), "dtypes is 'float16'"),
        (("--adam", "b3=0.1"), "adam is 'b3'"),
        (("--track", "wandb"), "track is 'wandb'"),
    ],
)
def test_invalid_training_flags(arguments, words) -> None:
    with pytest.raises(UsageError) as error:
        read_train(*arguments)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 3", "key 'lr' is not known, did you mean learning_rate?"),
        ("seq_len: 3", "key 'seq_len' is not known, did you mean sequence_length?"),
        ("text: {a: 1}", "text: key 'path' is missing; FILE: text: key 'a' is not known"),
        ("text: [{path: a, wieght: 1}]", "text: key 'wieght' is not known"),
    ],
)
def test_unknown_and_missing_keys_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError) as error:
        read_train("--config", str(tmp_path / "a.yaml"))
    assert words in str(error.value).replace(str(tmp_path / "a.yaml"), "FILE")


def test_an_unknown_key_of_a_section_is_named(file) -> None:
    with pytest.raises(UsageError, match=r"key 'train.stps' is not known, did you mean train.steps\?"):
        file("train:\n  stps: 3\n")
    with pytest.raises(UsageError, match=r"train\.steps is 0"):
        file("train:\n  steps: 0\n")


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = read_train("--text", "ä.txt", "--separator", r"\n", "--mesh", "data=2", "--warmup", "1,kept=5")
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(TrainConfig, tmp_path / "config.yaml") == config


def test_help_lists_every_key_of_train() -> None:
    help = subprocess.run([sys.executable, "-m", "tli_jax.train", "--help"], capture_output=True, text=True, timeout=60)
    assert help.returncode == 0 and help.stderr == ""
    for name in TRAIN_FIELDS:
        assert "--" + name.replace("_", "-") in help.stdout


def compare(*arguments: str) -> CompareConfig:
    return parse(CompareConfig, "program", "Description.", arguments)


def test_methods_are_words_or_mappings(tmp_path: Path) -> None:
    said = ({"method": "tli", "init": "half"}, {"method": "dus"}, {"method": "moe", "upcycle": "drop"})
    assert compare("--methods", "tli:half, dus,moe:drop").methods == said
    (tmp_path / "run.yaml").write_text("methods: [tli:half, {method: dus, drop: 1, name: shallow}]\nsteps: 0\n")
    found = compare("--config", str(tmp_path / "run.yaml"))
    assert found.methods == (said[0], {"method": "dus", "drop": 1, "name": "shallow"})
    assert found.steps == 0 and found.only == ("all", "injected") and found.baselines


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--only", "all,some"), "only"),
        (("--seeds", "0"), "seeds"),
        (("--run", "folder"), "--run is not known"),  # a comparison names its own runs
        (("--method", "dus"), "did you mean --methods?"),
    ],
)
def test_invalid_comparison_flags(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        compare(*flags)


def test_compare_has_every_training_key() -> None:
    """A new training key must be added to both configurations."""
    own = {"model", "revision", "run", "export", "export_only", "only", "distributed", "process", "keep", "track"}
    own |= {"max_shard_size", "overwrite", "profile", "timeouts", "grow"}
    names = {kind: {field.name for field in dataclasses.fields(kind)} for kind in (TrainConfig, CompareConfig)}
    assert names[TrainConfig] - names[CompareConfig] == own - {"model", "revision", "only"}


def test_yaml_round_trip_of_a_comparison(tmp_path: Path) -> None:
    config = compare("--methods", "tli:half,dus", "--old-text", "a.txt,b.txt", "--learning-rate", "1e-3,injected=2e-3")
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(CompareConfig, tmp_path / "config.yaml") == config


def test_tilde_expands_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    home.mkdir()
    (home / "up.yaml").write_text(
        "model: ~/m\noutput: ~/g\ntext: ~/t\ntrain: {run: ~/r, export: ~/e}\n", encoding="utf-8"
    )
    config = read("--config", "~/up.yaml", "--train.validation-text", "~/v,~/w")
    assert config.train is not None
    found = [config.model, config.output, config.text, config.train.run, config.train.export]
    assert found == [f"{home}/{name}" for name in "mgtre"]
    assert config.train.validation_text == (Source(f"{home}/v"), Source(f"{home}/w"))
    compared = compare(
        "--model", "~/m", "--output", "~/o", "--text", "~/t", "--old-text", "~/s", "--tasks", "~/q,embedded"
    )
    assert (compared.model, compared.output, compared.tasks) == (f"{home}/m", f"{home}/o", (f"{home}/q", "embedded"))
    assert (compared.text, compared.old_text) == ((Source(f"{home}/t"),), (Source(f"{home}/s"),))
    as_is = ["gs://bucket/~/x", "embedded", "a//b/", "org/name", "./~"]
    assert [read_train("--model", name).model for name in as_is] == as_is


def test_an_existing_path_may_contain_a_comma(tmp_path: Path, file) -> None:
    (tmp_path / "a,b.txt").touch()
    here = str(tmp_path)
    assert read_train("--text", f"{here}/a,b.txt").text == (Source(f"{here}/a,b.txt"),)
    assert read_train("--text", f"{here}/a,c.txt").text == (Source(f"{here}/a"), Source("c.txt"))
    assert compare("--tasks", f"{here}/a,b.txt").tasks == (f"{here}/a,b.txt",)
    assert file("train: {text: ['x,y', {path: 'x,z'}]}").train.text == (Source("x,y"), Source("x,z"))


@given(st.text())
def test_any_text_survives_yaml(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "c.yaml").write_text(to_yaml(UpscaleConfig(sample=text, revision=text)), encoding="utf-8")
        config = from_yaml(UpscaleConfig, Path(folder) / "c.yaml")
    assert (config.sample, config.revision) == (text, text)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in (str(tmp_path / "fifo"), "/dev/zero"):
        with pytest.raises(MissingInputError, match="no such configuration file"):
            read("--config", name)


def test_messages_stay_short(file) -> None:
    with pytest.raises(UsageError) as caught:
        file(f"after: [{','.join(['x' * 5000] * 20)}]\noutput: {['y'] * 3000}")
    assert len(str(caught.value)) < 2500 and "and 16 more" in str(caught.value)
