"""The fuzz targets: for each, valid inputs, how a trial changes them, and the commands that read them.

A trial works in its own folder, with a copy of the files that ``prepare`` wrote. Paths are relative to it.
"""

import dataclasses
import functools
import gzip
import io
import json
import lzma
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutate

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STEPS = 6


@dataclasses.dataclass
class Call:
    """A command: a module of the package and its arguments.

    Attributes:
        output: folder that must be complete after exit code 0, and absent otherwise.
        same: folder whose weights ``output`` must equal after exit code 0.
    """

    module: str
    arguments: list[str]
    output: str | None = None
    same: str | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """``prepare`` writes the valid inputs once; ``trial`` changes a copy of them and returns the commands to run.

    ``modules`` are imported once, before all trials. Fewer modules make forks faster.
    """

    prepare: Callable[[Path], None]
    trial: Callable[[random.Random, Path], list[Call]]
    modules: tuple[str, ...]


# --- Valid inputs. Deterministic, so that trials can be repeated.

_WORDS = ["the", "a", "one", "day", "girl", "named", "Lily", "went", "to", "her", "mom", "said", "dog", "was", "red"]
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
}


def sentences(count: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(_WORDS, k=12)).capitalize() + "." for _ in range(count)]


def make_model(folder: Path, shards: int = 1) -> None:
    """Write a small Llama with random weights, and a byte-level tokenizer that prepends BOS."""
    import numpy as np
    import tokenizers
    from safetensors.numpy import save_file

    D, F, K, V = (_CONFIG[key] for key in ("hidden_size", "intermediate_size", "head_dim", "vocab_size"))
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    layer = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (K, D), "self_attn.v_proj": (K, D)}
    layer |= {"self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    layer |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    for number in range(_CONFIG["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    draw = np.random.default_rng(0)
    tensors = {name: draw.normal(len(shape) == 1, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir()
    files = [SINGLE] if shards == 1 else [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file, {"format": "pt"})
    if shards > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1], "top_p": 0.9}))
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(sentences(50), V - 4, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.save_model(str(folder))  # vocab.json and merges.txt
    words: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(words))
    words |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "add_bos_token": True}
    words |= {"chat_template": "{{ messages }}", "added_tokens_decoder": {"0": {"content": "<s>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


def _both_models(folder: Path) -> None:
    make_model(folder / "m")
    make_model(folder / "s", 3)


def _with_text(folder: Path) -> None:
    make_model(folder / "m")
    (folder / "t.txt").write_text("\n".join(sentences(60)))


def _run(module: str, *arguments: str) -> None:
    import importlib

    from tli_jax.cli.frame import run_command

    assert run_command(importlib.import_module(module).main, arguments) == 0, (module, arguments)


def _grown(folder: Path) -> None:
    make_model(folder / "m")
    for name, flags in {"g": ["--every", "1"], "h": ["--method", "stack"]}.items():
        _run("tli_jax.upscale", "--model", str(folder / "m"), "--no-proof", "--output", str(folder / name), *flags)


_TRAIN = ["--only", "injected", "--batch-size", "2", "--sequence-length", "16", "--dtypes", "compute=float32"]
# With a constant schedule the learning rate does not depend on the number of steps.
_TRAIN += ["--save-every", "2", "--keep", "9", "--schedule", "constant"]


def _trained(folder: Path) -> None:
    """Write the run ``r`` of 4 steps with its model and text, and ``want``, the export after 6 steps."""
    _grown(folder)
    (folder / "t.txt").write_text("\n".join(sentences(60)))
    import os

    os.chdir(folder)
    start = ["--model", "g", "--text", "t.txt", "--run", "r", *_TRAIN]
    _run("tli_jax.train", *start, "--steps", "4")
    os.system("cp -r r r0")
    _run("tli_jax.train", "--run", "r", "--steps", str(STEPS), "--export", "want")
    os.system("rm -rf r && mv r0 r && cp r/config.yaml r.yaml")


# --- Headers and index.


def _split(data: bytes) -> tuple[Any, bytes] | None:
    """Header and data of a safetensors file; None if the header is not valid JSON."""
    length = int.from_bytes(data[:8], "little")
    header = mutate.read_json(data[8 : 8 + length])
    return None if header is None else (header, data[8 + length :])


def _headers(rng: random.Random, folder: Path) -> list[Call]:
    name = rng.choice("ms")
    files = sorted(path for path in (folder / name).iterdir() if ".safetensors" in path.name)
    for _ in range(rng.choice([1, 1, 2])):
        file = rng.choice(files)
        if not mutate.is_small(file):
            continue
        if file.name == INDEX:
            mutate.json_file(rng, file, [("weight_map", {}), ("metadata", None)])
        elif rng.random() < 0.5 and (parts := _split(file.read_bytes())):
            header, rest = parts
            text = mutate.dump(rng, mutate.tree(rng, header, [("x", {"dtype": "F32", "shape": []})]))
            length = len(text) if rng.random() < 0.8 else mutate.value(rng)
            length = length if type(length) is int and 0 <= length < 2**64 else len(text)
            file.write_bytes(struct.pack("<Q", length) + text + rest)
        else:
            mutate.any_file(rng, file)
    return [Call("upscale", ["--model", name, "--output", "o/x", *rng.choice(_GROWTHS)], "o/x")]


_GROWTHS = [
    ["--no-proof", "--every", "1"],
    ["--no-proof", "--every", "2", "--init", "average"],
    ["--no-proof", "--method", "stack", "--max-shard-size", "20KB"],
    ["--no-proof", "--method", "moe", "--experts", "2"],
]

# --- config.json.

_KEYS = [
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ("rope_scaling", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    ("rope_parameters", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
    ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    ("sliding_window", 4096),
    ("layer_types", ["full_attention"] * 2),
    ("num_local_experts", 10**9),
    ("num_experts_per_tok", 2),
    ("quantization_config", {"quant_method": "fp8"}),
    ("auto_map", {"AutoModel": "x.Y"}),
    ("dtype", "torch.float32"),
    ("pad_token_id", 999),
    ("attention_bias", True),
    ("model_type", "mixtral"),
    ("architectures", ["MixtralForCausalLM"]),
    ("pretraining_tp", 2),
    ("partial_rotary_factor", 0.5),
    ("head_dim", None),
    ("initializer_range", 1e999),
]


def _config(rng: random.Random, folder: Path) -> list[Call]:
    mutate.json_file(rng, folder / "m" / rng.choice(["config.json"] * 9 + ["generation_config.json"]), _KEYS)
    if rng.random() < 0.1:
        return [Call("upscale", ["--model", "m", "--plan-only", "--json", *rng.choice(_GROWTHS)])]
    return [Call("upscale", ["--model", "m", "--output", "o/x", *rng.choice(_GROWTHS)], "o/x")]


# --- growth.json.


def _growth(rng: random.Random, folder: Path) -> list[Call]:
    more = [("proof", {"logits": 1.0}), ("training", {"step": 1}), ("experts", {"count": 4}), ("version", 2)]
    mutate.json_file(rng, folder / "g" / "growth.json", more)
    grow = Call("upscale", ["--model", "g", "--output", "o/x", *rng.choice(_GROWTHS)], "o/x")
    report = Call("report", ["g", "h"] if rng.random() < 0.5 else ["g", "--layer-maps", "o.svg"])
    return rng.choice([[grow], [report], [grow, report]])


# --- YAML and flags.

_YAMLS: dict[str, dict[str, Any]] = {
    "upscale": {"model": "m", "output": "o/x", "every": 1, "method": "tli", "init": "identity", "proof": False}
    | {"after": [0, 1], "max_shard_size": "1MB", "shape": {"hidden_size": 16}, "sample": None, "scale": 0.5}
    | {"train": {"steps": 2, "text": "empty.txt", "run": "r", "mesh": {"fsdp": -1}}},
    "train": {"model": "m", "run": "r", "text": [{"path": "empty.txt", "weight": 1.0}], "steps": 5, "only": "all"}
    | {"learning_rate": {"all": 1e-4, "injected": 1e-3}, "warmup": "5,kept=2", "mesh": {"data": 1, "fsdp": -1}}
    | {"adam": {"b1": 0.9}, "dtypes": {"compute": "float32"}, "separator": "\\n", "track": ["tensorboard"]},
    "evaluate": {"model": "m", "text": "empty.txt", "batch_size": 2, "sequence_length": 16, "isolate": True},
    "compare": {"model": "m", "output": "o/x", "text": "empty.txt", "methods": ["tli:half", {"method": "dus"}]}
    | {"every": 1, "seeds": 2, "only": ["all"], "steps": 0, "batch_size": 2},
}
_SNIPPETS = [
    "&a [*a, *a]",
    "*nobody",
    "!!python/object/apply:os.system ['touch marker']",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "2026-01-01",
    "1:30:00",
    "0o17",
    "0x1F",
    ".inf",
    ".nan",
    "~",
    "|\n  text\n  text",
    "{? [a, b] : c}",
    "{1: 2, null: 3, 1.5: 4}",
    "<<: {a: 1}",
    '"\\ud800"',
    '"\\x1b[2J"',
    "no",
    "[" * 500,
    "\t- x",
    "\n---\na: 1",
    "!!float 1_0",
    "!!int ''",
    "!!timestamp x",
    "=",
]
# A kilobyte of YAML that expands to a billion nodes.
_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


def _yaml(rng: random.Random, folder: Path) -> list[Call]:
    name = rng.choice(list(_YAMLS))
    content = dict(_YAMLS[name])
    file, kind = folder / "c.yaml", rng.random()
    if kind < 0.55:
        for _ in range(rng.choice([1, 1, 2, 3])):
            content = mutate.tree(rng, content, [(key, None) for key in _fields(name)])
            content = content if isinstance(content, dict) else {"a": content}
        text = mutate.dump(rng, content)
    else:
        import yaml

        text = yaml.safe_dump(content, sort_keys=False).encode()
        if kind < 0.7:
            text = mutate.raw(rng, text)
        elif kind < 0.85:
            key, snippet = rng.choice([*content, "a"]), rng.choice(_SNIPPETS)
            text += f"{key}: {snippet}\n".encode()
        elif kind < 0.87:
            text = (_BOMB + f"{rng.choice(_fields(name))}: *{rng.choice('efghij')}\n").encode() + text
    file.write_bytes(text)
    if rng.random() < 0.03:
        mutate.swap(rng, file)
    flags = []
    if rng.random() < 0.4:
        for _ in range(rng.choice([1, 1, 2])):
            # A run must not wait for other processes that never start.
            key = rng.choice([key for key in _fields(name) if not key.endswith("process")])
            key = key.replace("_", "-") if rng.random() < 0.95 else key + "x"
            flags += [f"--{key}={mutate.word(rng)}"] if rng.random() < 0.8 else [f"--{key}", mutate.word(rng)]
    if name == "upscale" and rng.random() < 0.5:
        flags.append("--plan-only")
    return [Call(name, ["--config", "c.yaml", *flags])]


def _empty_text(folder: Path) -> None:
    """An empty text, so that a configuration that is valid by chance cannot start training."""
    make_model(folder / "m")
    (folder / "empty.txt").touch()


@functools.cache
def _fields(name: str) -> list[str]:
    from tli_jax.cli import config, growth_config, train_config

    schema = next(
        vars(module)[f"{name.capitalize()}Config"]
        for module in (train_config, growth_config, config)
        if f"{name.capitalize()}Config" in vars(module)
    )
    names = [field.name for field in dataclasses.fields(schema)]
    if name == "upscale":
        names += [f"train.{field.name}" for field in dataclasses.fields(train_config.TrainConfig)]
    return names


# --- Tokenizer.


def _tokenizer(rng: random.Random, folder: Path) -> list[Call]:
    model = folder / "m"
    more = [
        ("truncation", {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}),
        ("padding", {"strategy": {"Fixed": 600}, "direction": "Left", "pad_id": 3, "pad_type_id": 0, "pad_token": "x"}),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        ("decoder", None),
        ("model", {"type": "WordPiece", "vocab": {}, "unk_token": "?"}),
        ("added_tokens", [{"id": 10**9, "content": "x", "special": True}]),
    ]
    for _ in range(rng.choice([1, 1, 1, 2])):
        file = model / rng.choice(["tokenizer.json"] * 6 + ["tokenizer_config.json", "special_tokens_map.json"])
        mutate.json_file(rng, file, more)
    if rng.random() < 0.05 and mutate.is_small(model / "tokenizer.json"):
        (model / "tokenizer.json").unlink()
        mutate.any_file(rng, model / rng.choice(["vocab.json", "merges.txt"]))
    call = ["--model", "m", "--text", "t.txt"]
    if rng.random() < 0.1:
        return [Call("evaluate", [*call, "--sequence-length", "16", "--json"])]
    return [Call("upscale", [*call, "--output", "o/x", "--no-proof", "--every", "1"], "o/x")]


# --- Texts in all formats.


def _texts(folder: Path) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard
    from array_record.python.array_record_module import ArrayRecordWriter

    make_model(folder / "m")
    where, documents = folder / "texts", [*sentences(40), "naïve 한국어 😀", "x" * 300]
    where.mkdir()
    rows = "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(documents)).encode()
    plain = "<>".join(documents).encode()
    table = pa.table({"text": documents, "n": list(range(len(documents)))})
    for name, data in {"a.txt": plain, "a.md": plain, "a.jsonl": rows, "b.json": rows}.items():
        (where / name).write_bytes(data)
        (where / f"{name}.gz").write_bytes(gzip.compress(data, mtime=0))
        (where / f"{name}.xz").write_bytes(lzma.compress(data))
        (where / f"{name}.zst").write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(data))
    (where / "c.json").write_bytes(json.dumps([json.loads(row) for row in rows.splitlines()]).encode())
    (where / "a.csv").write_text("text,n\n" + "".join(f'"{text}",{n}\n' for n, text in enumerate(documents)))
    pq.write_table(table, where / "a.parquet", row_group_size=10)
    for name, compression in {"b.parquet": "zstd", "c.parquet": "none"}.items():
        pq.write_table(table, where / name, compression=compression)
    for name, make in {"a.arrow": pa.ipc.new_stream, "b.arrow": pa.ipc.new_file}.items():
        with make(str(where / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    writer = ArrayRecordWriter(str(where / "a.array_record"), "group_size:1")
    for text in documents:
        writer.write(text.encode())
    writer.close()
    buffer = io.BytesIO()
    np.save(buffer, np.arange(2000).astype(np.uint16) % 300)
    (where / "a.npy").write_bytes(buffer.getvalue())
    dataset = where / "dataset"
    dataset.mkdir()
    with pa.ipc.new_stream(str(dataset / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_split": None}
    (dataset / "state.json").write_text(json.dumps(state | {"_format_type": None, "_indices_data_files": None}))
    (dataset / "dataset_info.json").write_text(json.dumps({"features": {}, "splits": {"train": {}}}))


def _text(rng: random.Random, folder: Path) -> list[Call]:
    path = rng.choice(sorted((folder / "texts").iterdir()))
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    file = rng.choice(files)
    # A large text can be intended, so sizes are limited.
    if file.name.endswith(".jsonl"):
        mutate.lines_file(rng, file, largest=2**24)
    elif file.name in ("state.json", "dataset_info.json"):
        mutate.json_file(rng, file)
    elif file.name == "c.json" and rng.random() < 0.8:
        file.write_bytes(mutate.dump(rng, mutate.tree(rng, json.loads(file.read_bytes()))))
    else:
        mutate.any_file(rng, file, largest=2**24)
    if file == path and rng.random() < 0.15:  # its content does not match its name
        path = path.with_name("x" + rng.choice(sorted(other.name for other in path.parent.iterdir())))
        if file.exists() and not file.is_symlink():
            file.rename(path)
    given = rng.choice([str(path.relative_to(folder))] * 9 + ["texts"])
    # A sequence longer than any text: the command reads all of it, and refuses it before compiling.
    call = ["--model", "m", "--text", given, "--sequence-length", rng.choice(["100000"] * 9 + ["16"]), "--json"]
    call += rng.choice([[], [], ["--on-bad", "skip"], ["--separator", "<>"], ["--field", "n"], ["--eos"]])
    return [Call("evaluate", call)]


# --- Tasks.


def _tasks(folder: Path) -> None:
    make_model(folder / "m")
    text = sentences(12)
    rows: dict[str, list[dict[str, Any]]] = {
        "own": [{"context": a, "choices": [a[:9], a[9:], "x"], "answer": n % 3} for n, a in enumerate(text)],
        "boolq": [{"paragraph": a, "question": "?", "label": n % 2} for n, a in enumerate(text)],
        "copa": [
            {"premise": a, "question": "원인", "alternative_1": "one", "alternative_2": "two", "label": n % 2}
            for n, a in enumerate(text)
        ],
        "wic": [{"word": "a", "context_1": a, "context_2": a[::-1], "label": n % 2} for n, a in enumerate(text)],
        "hellaswag": [
            {"context": a, "label": n % 4} | {f"ending_{i}": a[i:] for i in range(1, 5)} for n, a in enumerate(text)
        ],
        "sentineg": [{"sentence": a, "label": n % 2} for n, a in enumerate(text)],
    }
    for name, found in rows.items():
        (folder / "tasks" / name).mkdir(parents=True)
        for split, part in {"test": found[:4], "train": found[4:]}.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (folder / "tasks" / name / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def _task(rng: random.Random, folder: Path) -> list[Call]:
    path = rng.choice(sorted((folder / "tasks").iterdir()))
    for _ in range(rng.choice([1, 1, 2])):
        mutate.lines_file(rng, path / rng.choice(["test.jsonl", "test.jsonl", "train.jsonl"]))
    where = str((path / "test.jsonl" if rng.random() < 0.3 else path).relative_to(folder))
    call = ["--model", "m", "--tasks", where, "--shots", rng.choice("0012"), "--json"]
    return [Call("evaluate", [*call, "--sequence-length", "64", "--batch-size", "2"])]


# --- Run directories.


def _run_folder(rng: random.Random, folder: Path) -> list[Call]:
    run = folder / "r"
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != "lock")
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(re.sub(r"\d+", "", file.relative_to(run).parts[0]), []).append(file)
    touched = rng.choice(sorted(parts))
    for _ in range(rng.choice([1, 1, 2])):
        file = rng.choice(parts[touched])
        if not mutate.is_small(file):
            continue
        if file.suffix == ".json":
            mutate.json_file(rng, file)
        elif file.suffix == ".jsonl" and touched == "metrics.jsonl":
            mutate.lines_file(rng, file)
        elif file.name == "config.yaml" and rng.random() < 0.6:
            import yaml

            file.write_bytes(mutate.dump(rng, mutate.tree(rng, yaml.safe_load((folder / "r.yaml").read_text()))))
        else:
            mutate.any_file(rng, file)
    # Some configuration keys may change the result. Any other damage must give the same bits or an error.
    same = None if touched == "config.yaml" else "want"
    resume = Call("train", ["--run", "r", "--steps", str(STEPS), "--export", "o/x"], "o/x", same)
    export = Call("train", ["--run", "r", "--export-only", "--export", "o/x"], "o/x")
    report = Call("report", ["r"])
    start = ["--model", "r", "--text", "t.txt", "--run", "r2", *_TRAIN, "--steps", "1", "--export", "o/x"]
    return rng.choice([[resume], [resume], [report], [export], [Call("train", start, "o/x")], [report, resume]])


_GROWING = ("tli_jax.upscale", "tli_jax.report", "tokenizers", "yaml", "rich.progress")
_COMPUTING = (
    *_GROWING,
    *("tli_jax.evaluate", "tli_jax.evaluation.scoring", "tli_jax.data.batches", "tli_jax.training.checkpoints"),
    *("tli_jax.training.export", "tli_jax.training.loop", "tli_jax.train"),
)
TARGETS = {
    "headers": Target(_both_models, _headers, _GROWING),
    "config": Target(_empty_text, _config, _GROWING),
    "growth": Target(_grown, _growth, _GROWING),
    "yaml": Target(_empty_text, _yaml, (*_COMPUTING, "tli_jax.compare")),
    "tokenizer": Target(_with_text, _tokenizer, (*_GROWING, "transformers.models.auto.tokenization_auto")),
    "text": Target(_texts, _text, _COMPUTING),
    "tasks": Target(_tasks, _task, _COMPUTING),
    "run": Target(_trained, _run_folder, _COMPUTING),
}
