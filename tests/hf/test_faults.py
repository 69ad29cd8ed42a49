"""Bad inputs: each is written to disk and given to the command, which refuses it in one line and changes no output."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

import tli_jax
from tli_jax import evaluate, train, upscale
from tli_jax.cli.frame import run_command
from tli_jax.cli.growth_config import UpscaleConfig
from tli_jax.errors import DataError
from tli_jax.hf import sidecar
from tli_jax.hf.headers import INDEX, SINGLE
from tli_jax.hf.inputs import MAX_JSON
from tli_jax.upscaling.job import grow, prepare

CONFIG = tli_jax.LlamaConfig(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
)
Q, Q_NEXT = "model.layers.2.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Damage = Callable[[Path], Any]


# --- The bases, and ways to damage a copy of one.


def save_tokenizer(folder: Path, tokens: int = 258) -> None:
    """A byte-level tokenizer with that many tokens."""
    words = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *(f"<{i}>" for i in range(tokens - 256))][:tokens]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``tied``, ``untied`` and ``sharded`` (tied, eight shards)."""
    root, rng = tmp_path_factory.mktemp("bases"), np.random.default_rng(0)
    for name, is_tied, shard in (("tied", True, "5GB"), ("untied", False, "5GB"), ("sharded", True, "20KB")):
        config = dataclasses.replace(CONFIG, tie_word_embeddings=is_tied)
        # Only the shapes come from the API: its random numbers take seconds to compile.
        shapes = jax.eval_shape(functools.partial(tli_jax.init_params, config), jax.random.key(0))
        params = jax.tree.map(lambda leaf: rng.normal(0, 0.02, leaf.shape).astype(leaf.dtype), shapes)
        tli_jax.save_hf(root / name, config, params, max_shard_size=shard)
        save_tokenizer(root / name)
    assert len(list((root / "sharded").glob("*.safetensors"))) == 8
    return root


def shard(folder: Path, number: int) -> Path:
    return folder / f"model-{number:05}-of-00008.safetensors"


def edit_json(name: str, **changes: Any) -> Damage:
    """Set keys of a JSON file; ``...`` removes a key."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return damage


def config(**changes: Any) -> Damage:
    return edit_json("config.json", **changes)


def map_to(*files: str, tensor: str = Q) -> Damage:
    """Add index entries that map a tensor, and made-up names like it, to these files."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] |= {tensor + "x" * i: file for i, file in enumerate(files)}
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def tensors(change: Callable[[dict[str, np.ndarray]], Any], file: str = SINGLE) -> Damage:
    """Change the tensors of a safetensors file, which remains valid."""

    def damage(folder: Path) -> None:
        content = {name: array.copy() for name, array in load_file(folder / file).items()}
        change(content)
        save_file(content, folder / file)

    return damage


def header(change: Callable[[dict[str, Any]], Any] | bytes, tail: bytes = b"") -> Damage:
    """Change the header but not the data; bytes replace the complete header."""

    def damage(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        if isinstance(change, bytes):
            text = change
        else:
            entries = json.loads(data[8 : 8 + length])
            change(entries)
            text = json.dumps(entries).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] + tail)

    return damage


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def put(tensor: str, at: int, *values: float) -> Damage:
    """Write values into a tensor."""
    return tensors(lambda t: t[tensor].reshape(-1).__setitem__(slice(at, at + len(values)), values))


def after(*steps: Damage) -> Damage:
    return lambda folder: [step(folder) for step in steps]


def link(name: str, target: str) -> Damage:
    """Move a file to ``target`` and leave a symbolic link to it in its place."""

    def damage(folder: Path) -> None:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / name, folder / target)
        (folder / name).symlink_to(target)

    return damage


def cast(name: str, dtype: str) -> Damage:
    return tensors(lambda t: t.__setitem__(name, t[name].astype(dtype)))


# --- Running the command, in this process.


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything in a folder: name → bytes, link target, or None for a folder."""
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        content = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        files[str(path.relative_to(folder))] = content
    return files


class Command:
    """Runs the command on a damaged copy ``base``. A complete older ``out`` exists and may be replaced."""

    def __init__(self, bases: Path, root: Path, capsys: pytest.CaptureFixture[str]):
        self.bases, self.root, self.capsys = bases, root, capsys
        self.base, self.outputs = root / "in" / "base", root / "outputs"
        shutil.copytree(bases / "tied", self.outputs / "out")

    def start(self, layout: str, damage: Damage, *flags: str, proof: bool = False) -> tuple[int, str]:
        """Exit code, and stderr without progress."""
        shutil.copytree(self.bases / layout, self.base)
        damage(self.base)
        flags = ("--model", str(self.base), "--output", str(self.outputs / "out"), "--overwrite", *flags)
        code = run_command(upscale.main, flags if proof else (*flags, "--no-proof"))
        stderr = self.capsys.readouterr().err
        return code, "".join(line for line in stderr.splitlines(True) if " done in " not in line)

    def refuses(self, layout: str, damage: Damage, code: int, *texts: str, flags: tuple[str, ...] = (), **kw: bool):
        before = snapshot(self.outputs)
        exit_code, stderr = self.start(layout, damage, *flags, **kw)
        *warnings, line = stderr.splitlines()
        assert line.startswith("error: ") and "internal" not in line
        assert all(warning.startswith("warning: ") for warning in warnings)
        for text in texts:
            assert text in line
        assert exit_code == code
        assert snapshot(self.outputs) == before

    def accepts(self, layout: str, damage: Damage, *warnings: str, flags: tuple[str, ...] = ()) -> Path:
        code, stderr = self.start(layout, damage, *flags)
        assert code == 0, stderr
        lines = stderr.splitlines()
        assert len(lines) == len(warnings)
        for line, warning in zip(lines, warnings, strict=True):
            assert line.startswith("warning: ") and warning in line
        assert [path.name for path in self.outputs.iterdir()] == ["out"]
        assert json.loads((self.outputs / "out" / "growth.json").read_text())["method"]
        return self.outputs / "out"


@pytest.fixture
def cli(bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    yield Command(bases, tmp_path, capsys)
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def test_bases_are_valid(cli: Command) -> None:
    for layout in ("tied", "untied", "sharded"):
        cli.accepts(layout, lambda folder: None)
        shutil.rmtree(cli.base)


# --- Weights.


@pytest.mark.parametrize("where", ["empty", "length", "header", "middle", "last byte"])
@pytest.mark.parametrize("layout", ["tied", "sharded"])
def test_a_cut_file_is_named_with_its_sizes(layout: str, where: str, cli: Command) -> None:
    name = SINGLE if layout == "tied" else shard(Path(), 3).name
    size = (cli.bases / layout / name).stat().st_size
    (length,) = struct.unpack("<Q", (cli.bases / layout / name).read_bytes()[:8])
    keep = {"empty": 0, "length": 7, "header": 100, "middle": size // 2, "last byte": size - 1}[where]
    expected = {"empty": "header", "length": "header", "header": f"{8 + length:,}"}.get(where, f"{size:,}")
    cli.refuses(
        layout, lambda folder: os.truncate(folder / name, keep), 65, str(cli.base / name), expected, f"{keep:,}"
    )


def test_all_missing_shards_are_named_at_once(cli: Command) -> None:
    names = [shard(Path(), number).name for number in (1, 4, 8)]
    damage = after(remove(*names), lambda folder: os.truncate(shard(folder, 2), 9))  # whose header is not even read
    cli.refuses("sharded", damage, 66, "3 of 8 shards missing", *names)


def test_a_tensor_in_two_shards(cli: Command) -> None:
    copy = tensors(lambda t: t.update({Q: np.ones((32, 32), np.float32)}), shard(Path(), 8).name)
    cli.refuses("sharded", copy, 65, shard(Path(), 8).name, Q, "is also in model-0000")


CONTRADICTIONS: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "the index lists tensors that no shard contains": (
        "sharded",
        map_to(*[shard(Path(), 1).name] * 7, tensor="model.x"),
        (INDEX, "model.x, model.xx, model.xxx, model.xxxx, model.xxxxx, …", "(7 in total)"),
    ),
    "the index does not list a tensor of a shard": (
        "sharded",
        tensors(lambda t: t.update(more=np.ones(3, np.float32)), shard(Path(), 1).name),
        (INDEX, "does not list", "more (1 in total)"),
    ),
    "the index lists the wrong shard": ("sharded", map_to(shard(Path(), 1).name), (INDEX, "wrong shard", Q)),
    "the index maps to a number": ("sharded", edit_json(INDEX, weight_map={Q: 1}), (INDEX, "weight_map")),
    "the index has no map": ("sharded", edit_json(INDEX, weight_map=...), (INDEX, "weight_map")),
    "the index maps nothing": (
        "sharded",
        edit_json(INDEX, weight_map={}),
        ("num_hidden_layers 4", "the weights 0 tensors"),
    ),
    "the index is a list": ("sharded", write(INDEX, b"[]"), (INDEX, "must be a JSON object")),
    "the index is too large": ("sharded", lambda folder: os.truncate(folder / INDEX, 2**40), (INDEX, f"{2**40:,}")),
    "tensors that no Llama has": (
        "tied",
        tensors(lambda t: t.update({f"model.layers.{i}.self_attn.q_proj.bias": t[Q][0].copy() for i in range(4)})),
        ("model.layers.0.self_attn.q_proj.bias", "(4 in total)"),
    ),
    "a layer more than the configuration": (
        "tied",
        config(num_hidden_layers=3),
        ("model.layers.3.input_layernorm.weight", "…", "(9 in total)"),
    ),
    "layers that are missing": (
        "tied",
        config(num_hidden_layers=5),
        ("model.layers.4.input_layernorm.weight", "…", "(9 in total)"),
    ),
    "a missing tensor": ("tied", tensors(lambda t: t.pop(Q)), ("missing", Q, "(1 in total)")),
    "an unknown buffer": ("tied", tensors(lambda t: t.update(inv_freq=np.ones(4, np.float32))), ("inv_freq",)),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_between_files(case: str, cli: Command) -> None:
    layout, damage, texts = CONTRADICTIONS[case]
    cli.refuses(layout, damage, 65, *texts)


def test_known_buffers_are_dropped_and_counted(cli: Command) -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(4)}
    out = cli.accepts("tied", tensors(lambda t: t.update(buffers)), "4 rotary buffers (inv_freq) are dropped")
    assert not any("inv_freq" in name for name in load_file(out / SINGLE))


PATHS = ["../tied/model.safetensors", "/etc/passwd", "sub/x.safetensors", "x\0.safetensors", "..\\x.safetensors",
         "x\n.safetensors", "..", "", "pytorch_model.bin", "x" * 300 + ".safetensors",
         "\ud800.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", PATHS, ids=lambda name: ascii(name[:20]))
def test_an_index_does_not_leave_its_folder(name: str, cli: Command) -> None:
    cli.refuses("sharded", map_to(name), 65, INDEX, repr(name)[1:-1][:40])


LINKS: dict[str, tuple[str, Damage, str]] = {
    "shard": ("sharded", link(shard(Path(), 2).name, "../elsewhere/shard"), "outside the folder"),
    "single": ("tied", link(SINGLE, "../elsewhere/file"), "outside the folder"),
    "index": ("sharded", link(INDEX, "../elsewhere/file"), "outside the folder"),
    "tokenizer": ("tied", link("tokenizer.json", "../elsewhere/file"), "outside the folder"),
    "licence": ("tied", lambda folder: (folder / "LICENSE").symlink_to("/etc/passwd"), "outside the folder"),
    "blobs outside a snapshot": ("tied", link(SINGLE, "../blobs/hash"), "outside the folder"),
    "circle": (
        "sharded",
        lambda folder: (shard(folder, 2).unlink(), shard(folder, 2).symlink_to(shard(folder, 2).name)),
        "1 of 8 shards missing",
    ),
    "pipe": ("tied", lambda folder: ((folder / SINGLE).unlink(), os.mkfifo(folder / SINGLE)), "not a regular file"),
}


@pytest.mark.parametrize("case", LINKS)
def test_links_do_not_leave_the_folder(case: str, cli: Command) -> None:
    layout, damage, text = LINKS[case]
    cli.refuses(layout, damage, 66 if case == "circle" else 65, text)


def test_links_of_the_hub_cache_are_followed(cli: Command) -> None:
    def cache(folder: Path) -> None:
        snapshot = folder / "models--org--name" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        for i, file in enumerate(path for path in folder.iterdir() if path.is_file()):
            shutil.move(file, snapshot / file.name)
            link(file.name, f"../../blobs/{i:040x}")(snapshot)

    out = cli.accepts("sharded", cache, flags=("--model", str(cli.base / "models--org--name" / "snapshots" / "0123")))
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (out / "tokenizer.json").read_bytes() == (cli.bases / "tied" / "tokenizer.json").read_bytes()


def offsets(start: int, end: int) -> Damage:
    return header(lambda h: h[Q].update(data_offsets=[h[Q]["data_offsets"][0] + start, h[Q]["data_offsets"][1] + end]))


HEADERS: dict[str, tuple[Damage, str]] = {
    "an impossible length": (write(SINGLE, struct.pack("<Q", 2**63) + b"{}"), f"{2**63:,}"),
    "a length larger than that of any model": (header(b" " * (MAX_JSON + 1)), f"{MAX_JSON + 1:,}"),
    "overlaps": (offsets(-4, -4), "overlaps"),
    "a gap": (header(lambda h: h.pop(Q)), "leaves a gap"),
    "a shape that does not fit": (header(lambda h: h[Q].update(shape=[32, 31])), "[32, 31] does not match"),
    "trailing bytes": (header(lambda h: None, b"\0"), "trailing bytes"),
    "a key twice": (header(b'{"a":{},"b":{},"a":{}}'), "'a' appears twice"),
    "a key twice in an entry": (header(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "'dtype' appears twice"),
    "a pointer": (write(SINGLE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "git lfs pull"),
    "a page": (write(SINGLE, b"<!DOCTYPE html><html><title>Sign in</title></html>"), "HTML page"),
    "another page": (write(SINGLE, b"\n<HTML><body>502 Bad Gateway"), "HTML page"),
    "no JSON": (header(b"{not JSON"), "is not JSON"),
    "no object": (header(b"[]"), "must be a JSON object"),
    "not UTF-8": (header(b"\xff\xfe\xfa"), "is not JSON"),
    "deep": (header(b'{"a":' * 500_000), "is not JSON"),
    "deep, but not too deep": (header(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"), "'a' is invalid"),
    "a number of a million digits": (header(b'{"a":' + b"9" * 1_000_000 + b"}"), "is not JSON"),
    "an unknown dtype": (header(lambda h: h[Q].update(dtype="Q4_K")), "'Q4_K'"),
    "an invalid dtype": (header(lambda h: h[Q].update(dtype=["F32"])), "is invalid"),
    "a negative size": (header(lambda h: h[Q].update(shape=[-32, -32])), "-32"),
    "a size that is not a number": (header(lambda h: h[Q].update(shape=[True, 1024])), "True"),
    "three offsets": (header(lambda h: h[Q]["data_offsets"].append(0)), "is invalid"),
    "no offsets": (header(lambda h: h[Q].pop("data_offsets")), "is invalid"),
    "invalid metadata": (header(lambda h: h.update(__metadata__=[])), "__metadata__"),
    "an escape sequence": (header(lambda h: h.update({"\33[2J\n": {}})), "'\\x1b[2J\\n'"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_do_not_add_up(case: str, cli: Command) -> None:
    damage, text = HEADERS[case]
    cli.refuses("tied", damage, 65, str(cli.base / SINGLE), text)


# Prints the MiB and the seconds that the command takes on top of the started interpreter.
MEASURE = """
import sys, time
from tli_jax import upscale
from tli_jax.cli.frame import run_command
def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith(key))
before, started = memory("VmRSS"), time.process_time()
code = run_command(upscale.main, sys.argv[1:])
print("measured", memory("VmHWM") - before, time.process_time() - started, file=sys.stderr)
sys.exit(code)
"""
FLOODS = {
    "empty objects": b'{"a":[' + b",".join([b"{}"] * (MAX_JSON // 3 - 9)) + b"]}",
    "many tensors": b"{" + b",".join(b'"%06x":{}' % i for i in range(MAX_JSON // 12)) + b"}",
    "a late double": b"{" + b",".join(b'"%06x":{}' % i for i in range(MAX_JSON // 12 - 9)) + b',"000000":0}',
    "huge shapes": b'{"a":{"data_offsets":[0,0],"dtype":"F32","shape":[' + b",".join([b"9" * 4200] * 950) + b"]}}",
}


@pytest.mark.parametrize("case", FLOODS)
def test_a_flood_of_a_header_costs_little(case: str, cli: Command) -> None:
    shutil.copytree(cli.bases / "tied", cli.base)
    header(FLOODS[case])(cli.base)
    flags = ("--model", str(cli.base), "--output", str(cli.root / "new"))
    done = subprocess.run([sys.executable, "-c", MEASURE, *flags], capture_output=True, text=True, timeout=60)
    error, measured = done.stderr.splitlines()
    assert done.returncode == 65 and error.startswith(f"error: {cli.base / SINGLE}")
    _, mib, seconds = measured.split()
    assert int(mib) < 200 and float(seconds) < 2


# --- Configurations.

# Reports pickles that were opened, and imports that are not needed to refuse them.
WATCH = """
import sys
def hook(event, arguments):
    if event == "pickle.find_class" or (event == "open" and str(arguments[0]).endswith(".bin")):
        print("seen", event, arguments, file=sys.stderr)
sys.addaudithook(hook)
from tli_jax import upscale
from tli_jax.cli.frame import run_command
code = run_command(upscale.main, sys.argv[1:])
if {"torch", "jax"} & sys.modules.keys():  # pickle is: numpy imports it
    print("torch or jax was imported", file=sys.stderr)
sys.exit(code)
"""


def test_a_pickle_is_never_opened(cli: Command) -> None:
    shutil.copytree(cli.bases / "tied", cli.base)
    marker = cli.root / "marker"
    (cli.base / SINGLE).unlink()
    (cli.base / "pytorch_model.bin").write_bytes(f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode())
    flags = ("--model", str(cli.base), "--output", str(cli.root / "new"))
    done = subprocess.run([sys.executable, "-c", WATCH, *flags], capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 65
    assert line.startswith(f"error: {cli.base}: only pickled weights (pytorch_model.bin)")
    assert not marker.exists() and not (cli.root / "new").exists()


CONFIGS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "not JSON": (write("config.json", b"{'hidden_size': 32}"), ("is not JSON",)),
    "a list": (write("config.json", b"[]"), ("must be a JSON object",)),
    "a page": (write("config.json", b"<!DOCTYPE html>"), ("is not JSON",)),
    "a key twice": (write("config.json", b'{"model_type": "llama", "model_type": "llama"}'), ("'model_type'", "twice")),
    "a key missing": (config(num_hidden_layers=...), ("'num_hidden_layers' is missing",)),
    "a key mistyped": (config(num_hidden_layers=..., num_hiden_layers=4), ("did you mean num_hiden_layers?",)),
    "text for a number": (config(hidden_size="32"), ("hidden_size is '32', must be a whole number",)),
    "a fraction": (config(num_hidden_layers=4.0), ("num_hidden_layers is 4.0",)),
    "a bool for a number": (config(num_key_value_heads=True), ("num_key_value_heads is True",)),
    "zero": (config(vocab_size=0), ("vocab_size is 0",)),
    "text for a bool": (config(tie_word_embeddings="yes"), ("tie_word_embeddings is 'yes'",)),
    "not a number": (config(rms_norm_eps=float("nan")), ("the number NaN, which is not finite",)),
    "an infinite number": (
        write("config.json", b'{"model_type": "llama", "x": [1e999]}'),
        ("the number 1e999, which is not finite",),
    ),
    "a number too large for a float": (config(rms_norm_eps=10**400), ("rms_norm_eps is 1000",)),
    "a number of 5,000 digits": (write("config.json", b'{"x": ' + b"1" * 5000 + b"}"), ("is not JSON",)),
    "nested too deeply": (write("config.json", b'{"x": ' + b"[" * 500 + b"]" * 500 + b"}"), ("nested more than 100",)),
    "nested far too deeply": (write("config.json", b'{"x": ' + b"[" * 10**6), ("is not JSON",)),
    "heads that do not divide": (config(head_dim=..., num_attention_heads=5), ("hidden_size 32", "_heads 5")),
    "groups that do not divide": (config(num_key_value_heads=3), ("num_attention_heads 4", "num_key_value_heads 3")),
    "an odd head": (config(head_dim=7), ("head_dim 7",)),
    "another width": (config(intermediate_size=50), ("mlp.down_proj.weight is [32, 48] instead of [32, 50]",)),
    "another vocabulary": (config(vocab_size=300), (f"{EMBEDDING} is [258, 32] instead of [300, 32]",)),
    "other heads": (config(num_key_value_heads=4), ("k_proj.weight is [16, 32] instead of [32, 32]", "(8 in total)")),
    "a trillion layers": (config(num_hidden_layers=10**12), ("num_hidden_layers 1,000,000,000,000",)),
    # Not a plain Llama.
    "window": (config(sliding_window=4096), ("sliding_window = 4096",)),
    "attention bias": (config(attention_bias=True), ("attention_bias = True",)),
    "mlp bias": (config(mlp_bias=True), ("mlp_bias = True",)),
    "activation": (config(hidden_act="gelu"), ("hidden_act = 'gelu'",)),
    "quantised": (config(quantization_config={"quant_method": "fp8"}), ("quantization_config = {'quant_method'",)),
    "windows by layer": (config(layer_types=["sliding_attention"] * 4), ("layer_types has 'sliding_attention'",)),
    "rope type that is not a string": (config(rope_scaling={"rope_type": 3}), ("rope_scaling has rope type 3",)),
    "rope factor": (config(rope_scaling={"rope_type": "linear"}), ("rope_scaling: key 'factor' is missing",)),
    "rope that is not an object": (config(rope_scaling="linear"), ("rope_scaling is 'linear'",)),
    "architecture": (config(architectures=["MistralForCausalLM"], model_type="mistral"), ("MistralForCausalLM",)),
    "model type": (config(model_type=...), ("model_type None",)),
    "a start that is text": (config(bos_token_id="<s>"), ("bos_token_id is '<s>'",)),
    "an end that is text": (config(eos_token_id=["</s>"]), ("eos_token_id is ['</s>']",)),
    "dtype": (config(torch_dtype="float64"), ("dtype 'float64'",)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_is_wrong_or_not_a_llama(case: str, cli: Command) -> None:
    damage, texts = CONFIGS[case]
    cli.refuses("tied", damage, 65, str(cli.base), "config.json", *texts)


DTYPES = {
    "fp8": (after(cast(Q, "int8"), header(lambda h: h[Q].update(dtype="F8_E4M3"))), f"{Q} is F8_E4M3"),
    "fp64": (cast(Q, "float64"), f"{Q} is F64"),
    "int8": (cast(Q, "int8"), f"{Q} is I8"),
}


@pytest.mark.parametrize("case", DTYPES)
def test_dtypes_that_are_not_supported(case: str, cli: Command) -> None:
    damage, text = DTYPES[case]
    cli.refuses("tied", damage, 65, text)


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        {"type": "of tomorrow"},
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_model_that_cannot_be_run_can_be_grown_without_a_proof(key: str, rope: dict[str, Any], cli: Command) -> None:
    kind = repr(rope.get("rope_type", rope.get("type")))
    damage = config(**{"rope_scaling": ..., "rope_theta": ..., key: rope})
    out = cli.accepts("tied", damage, f"RoPE type {kind} is not supported")
    assert json.loads((out / "config.json").read_text())[key] == rope
    record, card = json.loads((out / "growth.json").read_text()), (out / "README.md").read_text()
    assert record["proof"] is None and record["not_proved"] == f"--no-proof because RoPE type {kind} is not supported"
    assert f"No proof was run ({record['not_proved']})" in card
    ids = np.zeros((1, 3), np.int32)
    with pytest.raises(DataError, match=f"{kind} is not supported"):
        tli_jax.forward(*tli_jax.load_hf(out), ids)


def test_model_that_cannot_be_run_is_neither_proved_nor_sampled_nor_trained(cli: Command, tmp_path: Path) -> None:
    damage = config(rope_scaling={"type": "dynamic", "factor": 2.0})
    cli.refuses("tied", damage, 65, "cannot be run, RoPE type 'dynamic'", "grow it with --no-proof", proof=True)
    for flags in (
        ["--sample", "x"],
        ["--method", "adept"],
        ["--train.run", str(tmp_path / "run"), "--train.text", "x"],
    ):
        shutil.rmtree(cli.base)
        cli.refuses("tied", damage, 65, "cannot be run, RoPE type 'dynamic'", flags=tuple(flags))
    for main, flags in ((train.main, ["--run", str(tmp_path / "run")]), (evaluate.main, [])):
        code = run_command(main, ["--model", str(cli.base), "--text", str(cli.base / "config.json"), *flags])
        assert code == 65 and "RoPE type 'dynamic'" in cli.capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "base_model.model.", "module._orig_mod."])
@pytest.mark.parametrize("layout", ["untied", "sharded"])
def test_common_prefix_is_dropped(prefix: str, layout: str, cli: Command) -> None:
    good = cli.accepts(layout, lambda folder: None)
    expected = json.loads((good / "growth.json").read_text())["digests"]
    shutil.rmtree(cli.base)

    def rename(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            save_file({prefix + name: array for name, array in load_file(file).items()}, file)
        if (folder / INDEX).exists():
            names = json.loads((folder / INDEX).read_text())["weight_map"]
            edit_json(INDEX, weight_map={prefix + name: file for name, file in names.items()})(folder)

    out = cli.accepts(layout, rename, f"all tensor names start with {prefix!r}")
    assert json.loads((out / "growth.json").read_text())["digests"] == expected


@pytest.mark.parametrize("names", [{}, {Q: "_orig_mod." + Q}], ids=["of another", "of some"])
def test_unknown_names_are_shown_with_the_missing_ones(names: dict[str, str], cli: Command) -> None:
    def rename(content: dict[str, np.ndarray]) -> None:
        for name in list(content):
            content[names.get(name, name) if names else f"transformer.{name}"] = content.pop(name)

    shown = "_orig_mod." + Q if names else f"transformer.{EMBEDDING}"
    cli.refuses("tied", tensors(rename), 65, "are missing", Q if names else EMBEDDING, f"found instead: {shown}")


def test_index_may_list_tensors_that_a_llama_does_not_need(cli: Command) -> None:
    buffers = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)]

    def name(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        file = shard(Path(), 1).name
        edit_json(INDEX, weight_map=index | dict.fromkeys([*buffers, HEAD], file))(folder)

    out = cli.accepts(
        "sharded", name, "lists 5 tensors that no shard contains and the model does not need, such as lm_head"
    )
    assert set(load_file(out / SINGLE)) == {
        f"model.layers.{i}.{name}" for i in range(5) for name in CONFIG.layer_tensors
    } | {EMBEDDING, "model.norm.weight"}


def test_index_may_not_list_a_missing_head(cli: Command) -> None:
    cli.refuses(
        "sharded",
        after(config(tie_word_embeddings=False), map_to(shard(Path(), 1).name, tensor=HEAD)),
        65,
        HEAD,
        "lists tensors that no shard contains",
    )


MIXED = "layers are stored in different dtypes (self_attn.q_proj.weight)"


def test_layers_keep_their_dtypes(cli: Command) -> None:
    out = cli.accepts("tied", cast(Q_NEXT, "float16"), MIXED)
    grown, base = load_file(out / SINGLE), load_file(cli.base / SINGLE)
    assert grown[Q_NEXT].dtype == np.float16 and grown["model.layers.4.self_attn.q_proj.weight"].dtype == np.float16
    assert (grown[Q_NEXT] == base[Q_NEXT]).all() and (grown[Q] == base[Q]).all()
    with pytest.warns(UserWarning, match="layers.self_attn.q_proj.weight is stored in different dtypes"):
        stacked = tli_jax.load_hf(out)[1]["layers"]["self_attn"]["q_proj"]["weight"]
    assert stacked.dtype == np.float32 and (np.asarray(stacked)[3] == base[Q_NEXT].astype(np.float32)).all()
    for dtype in ("float32", "float16", "bfloat16"):
        leaves = jax.tree.leaves(tli_jax.load_hf(out, dtype=dtype)[1])  # no warning
        assert {leaf.dtype.name for leaf in leaves} == {dtype}


@pytest.mark.parametrize("method", ["average", "slayer"])
def test_mean_of_layers_of_different_dtypes_is_computed_in_float32(method: str, cli: Command) -> None:
    flags = ("--method", method, "--after", "2")
    out = cli.accepts("tied", cast(Q_NEXT, "float16"), MIXED, flags=flags)
    found = {name: array for name, array in load_file(out / SINGLE).items() if name.startswith("model.layers.3.")}
    shutil.rmtree(cli.base)

    def widen(content: dict[str, np.ndarray]) -> None:
        content[Q_NEXT] = content[Q_NEXT].astype(np.float16).astype(np.float32)

    out = cli.accepts("tied", tensors(widen), flags=flags)
    expected = load_file(out / SINGLE)
    for name, array in found.items():
        assert array.dtype == np.float32 and (array == expected[name]).all(), name


def test_lone_surrogates_are_written_unchanged(cli: Command) -> None:
    out = cli.accepts("tied", config(of_somebody="\ud800 ü"))
    assert json.loads((out / "config.json").read_text())["of_somebody"] == "\ud800 ü"


# --- A base that changes during growth.


@pytest.mark.parametrize("change", ["written to", "replaced", "removed", "configuration"])
def test_base_that_changes_meanwhile(change: str, bases: Path, tmp_path: Path) -> None:
    base = shutil.copytree(bases / "tied", tmp_path / "base")
    job = prepare(UpscaleConfig(model=str(base), output=str(tmp_path / "out"), proof=False))
    file = base / ("config.json" if change == "configuration" else SINGLE)
    with pytest.MonkeyPatch.context() as patch:
        if change == "written to":
            with file.open("r+b") as stream:
                stream.seek(-4, os.SEEK_END)
                stream.write(b"\0\0\0\0")
        elif change == "removed":  # at the last moment, or there would be nothing to read
            copy_allowed = sidecar.copy_allowed
            patch.setattr(sidecar, "copy_allowed", lambda *args: (copy_allowed(*args), file.unlink()))
        else:
            shutil.copyfile(file, tmp_path / "copy")
            shutil.copystat(file, tmp_path / "copy")
            (tmp_path / "copy").replace(file)
        with pytest.raises(DataError, match=rf"{file.name}: changed while it was read"):
            grow(job, {})
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))] == []


# --- Sizes.

HOSTILE = """
import contextlib, io, json, resource, shutil, sys, time
from pathlib import Path
from tli_jax import upscale
from tli_jax.cli.frame import run_command

def most() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

base, output = Path(sys.argv[1]), sys.argv[2]
config = json.loads((base / "config.json").read_text())
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    run_command(upscale.main, ["--model", str(base), "--output", output, "--no-proof"])  # what is imported late
shutil.rmtree(output)
for name, changes, flags in json.load(sys.stdin):
    (base / "config.json").write_text(json.dumps(config | changes))
    shutil.rmtree(output, ignore_errors=True)
    before, started = most(), time.monotonic()
    stderr = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
        code = run_command(upscale.main, ["--model", str(base), "--output", output, "--no-proof", *flags])
    print(json.dumps([name, code, time.monotonic() - started, most() - before, stderr.getvalue()]), flush=True)
"""
HUGE = 10**9
MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
SIZES: dict[str, tuple[dict[str, Any], list[str], int]] = {
    "layers": ({"num_hidden_layers": HUGE}, [], 65),
    "experts": (MIXTRAL | {"num_local_experts": HUGE}, [], 65),
    "experts below the number of tensors": (MIXTRAL | {"num_local_experts": 38}, [], 65),
    "vocabulary": ({"vocab_size": 10**12}, [], 65),
    "heads": ({"num_attention_heads": HUGE, "num_key_value_heads": HUGE}, [], 65),
    "context": ({"max_position_embeddings": 1}, [], 65),
    "head size": ({"head_dim": 10**18}, [], 65),
    "width": ({"hidden_size": 10**12}, [], 65),
    "feed-forward": ({"intermediate_size": 10**18}, [], 65),
    "beyond 64 bits": ({"intermediate_size": 10**30}, [], 65),
    "every": ({}, ["--every", str(HUGE)], 2),
    "groups": ({}, ["--method", "llama_pro", "--groups", str(HUGE)], 2),
    "copies": ({}, ["--copies", str(HUGE)], 2),
    "copies of each": ({}, ["--method", "interpose", "--copies", "100"], 0),
    "times": ({}, ["--method", "stack", "--times", str(HUGE)], 2),
    "drop": ({}, ["--method", "dus", "--drop", str(HUGE)], 2),
    "block": ({}, ["--method", "midas", "--block", str(HUGE)], 2),
    "count": ({}, ["--method", "adept", "--count", str(HUGE)], 2),
    "after": ({}, ["--after", str(HUGE)], 2),
    "new experts": ({}, ["--experts", str(HUGE)], 2),
    "top_k": ({}, ["--top-k", str(HUGE)], 2),
    "granularity": ({}, ["--upcycle", "virtual_groups", "--granularity", str(HUGE)], 2),
    "experts of many layers": ({}, ["--method", "stack", "--times", "1000", "--experts", "10000"], 2),
    "custom": ({}, ["--method", "custom", "--layers", "0-1000000000"], 2),
    "custom, digits": ({}, ["--method", "custom", "--layers", "9" * 5000], 2),
    "custom, many": ({}, ["--method", "custom", "--layers", ",".join(["0-3"] * 20_000)], 2),
    "shard": ({}, ["--max-shard-size", "9" * 400 + "GB"], 2),
}


def test_impossible_sizes_are_refused_early(bases: Path, tmp_path: Path) -> None:
    shutil.copytree(bases / "tied", tmp_path / "base")
    call = [sys.executable, "-c", HOSTILE, str(tmp_path / "base"), str(tmp_path / "out")]
    cases = json.dumps([[name, changes, flags] for name, (changes, flags, _) in SIZES.items()])
    done = subprocess.run(call, input=cases, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == list(SIZES)
    for name, code, seconds, mebibytes, stderr in found:
        assert code == SIZES[name][2], (name, stderr)
        if code:
            assert seconds < 2 and mebibytes < 200, (name, seconds, mebibytes)


def test_remote_code_is_neither_run_nor_copied(cli: Command) -> None:
    marker = cli.root / "marker"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n".encode()
    damage = after(
        config(auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}),
        *(write(name, code) for name in ("modeling_mine.py", "tokenization_mine.py", "LICENSE.py", "sitecustomize.py")),
    )
    left = "not copied: LICENSE.py, modeling_mine.py, sitecustomize.py, tokenization_mine.py"
    out = cli.accepts("tied", damage, "auto_map refers to Python code of the model, which is never run", left)
    assert not marker.exists()
    assert not list(out.glob("*.py"))


def test_weights_that_are_not_finite(cli: Command) -> None:
    nan, inf = float("nan"), float("inf")
    damage = after(put(Q, 5, nan, -inf), put(EMBEDDING, 0, inf))
    named = f"NaN or Inf in 2 tensors: {EMBEDDING} (1), {Q} (2)"
    cli.refuses("tied", damage, 65, str(cli.base), named, "--allow-nonfinite")
    shutil.rmtree(cli.base)
    out = cli.accepts("tied", damage, named, flags=("--allow-nonfinite",))
    assert json.loads((out / "growth.json").read_text())["nonfinite"] == {EMBEDDING: 1, Q: 2}
    assert np.isnan(load_file(out / SINGLE)[Q][0, 5])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_nonfinite_half_precision(dtype: str, cli: Command) -> None:
    def damage(folder: Path) -> None:
        all_tensors = {name: array.astype(jax.numpy.dtype(dtype)) for name, array in load_file(folder / SINGLE).items()}
        all_tensors[Q][3, :7] = np.nan
        save_file(all_tensors, folder / SINGLE)

    cli.refuses("tied", damage, 65, f"1 tensors: {Q} (7)")


def test_a_tied_head_that_equals_the_embedding_is_stored_once(cli: Command) -> None:
    out = cli.accepts("tied", tensors(lambda t: t.update({HEAD: t[EMBEDDING]})), f"{HEAD} equals the embedding")
    assert HEAD not in load_file(out / SINGLE)


HEADS: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "a tied head that differs": ("tied", tensors(lambda t: t.update({HEAD: -t[EMBEDDING]})), (HEAD, "ties the head")),
    "a tied head, shorter": ("tied", tensors(lambda t: t.update({HEAD: t[EMBEDDING][:9]})), (HEAD, "ties the head")),
    "no head and not tied": ("untied", tensors(lambda t: t.pop(HEAD)), ("missing", HEAD)),
    "not tied by default": ("tied", config(tie_word_embeddings=...), ("missing", HEAD)),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads(case: str, cli: Command) -> None:
    layout, damage, texts = HEADS[case]
    cli.refuses(layout, damage, 65, *texts)


OPTIONS = {
    "--every 0": "every is 0, must be 1…4",
    "--every 5": "every is 5, must be 1…4",
    "--every 3 --remainder error": "every 3 does not divide 4 layers",
    "--copies 0": "copies is 0, must be 1…1000",
    "--after 4": "after: position is 4, must be 0…3",
    "--after -1": "after: position is -1, must be 0…3",
    "--after 1,1": "after is [1, 1]: list at least one position, and each only once",
    "--after ,": "at least one",
    "--init scaled": "scaled requires a scale",
    "--method dus --drop 4": "drop is 4, must be 0…3",
    "--method dus --drop -1": "drop is -1, must be 0…3",
    "--method llama_pro --groups 3": "groups is 3, must divide 4 layers: one of 1, 2, 4",
    "--method stack --times 0": "times is 0, must be 1…1000",
    "--method average --every 9": "every is 9, must be 1…4",
    "--method slayer --after 7": "after: position is 7, must be 0…3",
    "--method interpose --after 9": "after: position is 9, must be 0…3",
    "--method custom": "custom needs --layers",
    "--method custom --layers 0-4": "'0-4' is out of range, the base has layers 0-3",
    "--method custom --layers ,": "'' is not a layer like",
    "--method custom --layers 0-3;7": "'0-3;7' is not a layer like",
    "--method stack --every 2": "every: not an option of method stack",
    "--max-shard-size 0GB": "max_shard_size '0GB' is not a size",
    "--max-shard-size many": "max_shard_size 'many' is not a size",
    "--evry 2": "--evry is not known, did you mean --every?",
    "--copys=2": "--copys=2 is not known, did you mean --copies?",
    "--every two": "every is 'two'",
    "--method sliding": "method is 'sliding', must be one of tli, dus, llama_pro",
    "--revision main": "is a local folder, which has no revision 'main'",
    "2": "'2' is not an option",
}


@pytest.mark.parametrize("flags", OPTIONS)
def test_options_out_of_range(flags: str, cli: Command) -> None:
    cli.refuses("tied", lambda folder: None, 2, OPTIONS[flags], flags=tuple(flags.split()))


# --- Tokenizers, missing folders, texts, and records of an earlier growth.


def test_a_tokenizer_larger_than_the_vocabulary(cli: Command) -> None:
    larger = lambda folder: save_tokenizer(folder, 259)  # noqa: E731
    cli.refuses("tied", larger, 65, str(cli.base), "the tokenizer has 259 tokens, the model's vocabulary 258")


def test_a_tokenizer_smaller_than_the_vocabulary(cli: Command) -> None:
    cli.accepts("tied", lambda folder: save_tokenizer(folder, 256), "the tokenizer uses 256 of the 258")


def test_no_tokenizer(cli: Command) -> None:
    cli.accepts("tied", remove("tokenizer.json"), "no tokenizer")


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"<html>", b'{"model": {"type": "BPE", "vocab": {}}}'], ids=str)
def test_damaged_tokenizer(content: bytes, cli: Command) -> None:
    message = "is an HTML page" if content == b"<html>" else "the tokenizer cannot be read"
    cli.refuses("tied", write("tokenizer.json", content), 65, str(cli.base), message)


MISSING: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no weights": (remove(SINGLE), ("no weights", SINGLE, INDEX)),
    "no configuration": (remove("config.json"), ("no config.json",)),
    "weights of another format": (
        lambda folder: (folder / SINGLE).rename(folder / "model.gguf"),
        ("no weights", SINGLE, INDEX),
    ),
    "no folder": (shutil.rmtree, ("no folder or GGUF file", "base")),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.touch()), ("base' is a file, but not GGUF",)),
    "a run": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "run.json").touch()),
        ("is a run directory", "--export-only --export DIR"),
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_not_there(case: str, cli: Command) -> None:
    damage, texts = MISSING[case]
    cli.refuses("tied", damage, 66, str(cli.base), *texts)


TEXTS: dict[str, tuple[bytes | None, int, str]] = {
    "not UTF-8": ("eins\nzwei\ndr\u00fcben\n".encode("latin-1"), 65, "line 3: not UTF-8"),
    "empty": (b"", 65, "empty file"),
    "blank": (b" \n\n", 65, "no document contains text"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", 65, "is a Git LFS pointer"),
    "short": (b"a few words", 65, "the text has 11 tokens, the proof needs 128"),
    "absent": (None, 66, "no such text file"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts(case: str, cli: Command) -> None:
    content, code, text = TEXTS[case]
    file = cli.root / "text.txt"
    if content is not None:
        file.write_bytes(content)
    texts = (text,) if case == "short" else (str(file), text)
    cli.refuses("tied", lambda folder: None, code, *texts, flags=("--text", str(file)), proof=True)


PLAN = {**tli_jax.tli(2, 1).to_json(), "digests": None, "proof": None}
GROWTHS: dict[str, tuple[Damage, str]] = {
    "not JSON": (write("growth.json", b"{"), "is not JSON"),
    "a list": (write("growth.json", b"[]"), "must be a JSON object"),
    "empty": (write("growth.json", b"{}"), "version None is not 1"),
    "of a future version": (write("growth.json", json.dumps(PLAN | {"version": 2}).encode()), "version 2 is not 1"),
    "no rows": (write("growth.json", json.dumps(PLAN | {"rows": []}).encode()), "not a growth plan"),
    "an invalid row": (write("growth.json", json.dumps(PLAN | {"rows": [1] * 4}).encode()), "not a growth plan"),
    "no history": (
        write("growth.json", json.dumps({k: v for k, v in PLAN.items() if k != "history"}).encode()),
        "history",
    ),
    "a base that is too shallow": (
        write("growth.json", json.dumps(PLAN | {"base": {"layers": 1}}).encode()),
        "must be layers of the first base",
    ),
    "of another depth": (
        write("growth.json", json.dumps(tli_jax.tli(4, 1).to_json()).encode()),
        "describes 8 layers, config.json 4",
    ),
    "a short map": (write("growth.json", json.dumps(PLAN | {"layer_map": [[0]]}).encode()), "layer_map has 1 layers"),
}


@pytest.mark.parametrize("case", GROWTHS)
def test_damaged_growth_record(case: str, cli: Command) -> None:
    damage, text = GROWTHS[case]
    cli.refuses("tied", damage, 65, str(cli.base / "growth.json"), text)


def test_valid_growth_record_is_continued(cli: Command) -> None:
    out = cli.accepts("tied", write("growth.json", json.dumps(PLAN).encode()))
    record = json.loads((out / "growth.json").read_text())
    assert record["layer_map"] == [[0], [0], [1], [1], [1]] and len(record["history"]) == 1
