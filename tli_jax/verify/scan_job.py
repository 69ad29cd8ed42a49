"""A scan from a model folder and texts to plain data: what each layer is worth, and which layers to double."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tli_jax.cli.config import ScanConfig
from tli_jax.cli.console import to_json, warn
from tli_jax.cli.progress import progress
from tli_jax.data.documents import read_plain
from tli_jax.data.embedded import held_out_modules, topics
from tli_jax.distributed import processes
from tli_jax.distributed.mesh import check_fits, make_mesh, param_sharding
from tli_jax.errors import DataError, OutputError, UsageError
from tli_jax.growth.doubling import BLOCKS, DOUBLINGS, bypass, double, repeat_block
from tli_jax.growth.plan import Plan
from tli_jax.hf import hub, sidecar, tokens
from tli_jax.hf.checkpoint import Checkpoint, model_digest, open_checkpoint
from tli_jax.hf.encoding import Tokenizer
from tli_jax.hf.files import lock, replace_file, storage_errors
from tli_jax.hf.load import load_hf
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.models.config import LlamaConfig
from tli_jax.models.tree import nest
from tli_jax.verify.layer_facts import layer_facts
from tli_jax.verify.loss_file import LossFile, Steps
from tli_jax.verify.scan import Scanner, base_steps, to_steps
from tli_jax.verify.search import find_layers

_LONGEST = 32  # characters of text read per token that is needed


def run_scan(config: ScanConfig) -> dict[str, Any]:
    """Scan as configured. Writes ``losses.jsonl``, ``scan.json`` and a plan file for each depth in ``grow_to``.

    Returns:
        The content of ``scan.json``: ``texts`` with the loss of the base; ``costs`` by text and what was measured, in
        nats per token above the base (one number per layer; for blocks, rows ``[first, last, cost]``); ``layers`` with
        the facts of ``layer_facts``; ``plans`` by depth.

    Raises:
        TliError: a wrong option, or input that is missing or damaged.
    """
    for name in ("model", "text", "output"):
        if not getattr(config, name):
            raise UsageError(f"{name} is not set: --{name} is needed, see --help")
    base = open_checkpoint(hub.resolve(config.model, config.revision))
    base.config.check_runnable(str(base.folder))
    tokenizer, warnings = open_tokenizer(base.folder, base.config)
    for warning in (*base.warnings, *warnings):
        warn(warning)
    if tokenizer is None:
        raise DataError(f"{base.folder}: no tokenizer, which a scan needs to read the text: add one")
    L = base.config.num_hidden_layers
    if config.grow_to and not set(config.what) & set(DOUBLINGS):
        raise UsageError(f"grow_to needs the cost of doubling a layer: add one of {', '.join(DOUBLINGS)} to what")
    for depth in config.grow_to:
        if not L < depth <= 2 * L:
            raise UsageError(f"grow_to is {depth}, must be {L + 1}…{2 * L} for a base of {L} layers")
    sources = {"text": config.text} | ({} if config.old_text is None else {"old_text": config.old_text})
    windows = {name: _read_windows(name, path, config, base, tokenizer) for name, path in sources.items()}
    output = Path(config.output)
    if not processes.is_first():
        return _Scan(config, base, windows, output).run()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output {output}: cannot be created ({error.strerror}): choose another folder") from None
    try:
        with lock(output / ".lock", blocking=False):
            return _Scan(config, base, windows, output).run()
    except BlockingIOError:
        raise OutputError(f"output {output}: another scan is writing to it: wait, or choose another folder") from None


class _Scan:
    """The parts of ``run_scan`` that share the loaded base."""

    def __init__(self, config: ScanConfig, base: Checkpoint, windows: Mapping[str, np.ndarray], output: Path):
        self.config, self.base, self.windows, self.output = config, base, windows, output
        self.L = base.config.num_hidden_layers
        self.digest = model_digest(base)
        identity = {"version": 1, "model": self.digest, "dtype": config.dtype}
        identity |= {name: hashlib.sha256(rows.tobytes()).hexdigest() for name, rows in windows.items()}
        model, params = load_hf(base.folder, config.dtype, _shardings(config, base.config))
        self.scanners = {name: Scanner(model, params, rows) for name, rows in windows.items()}
        self.file = LossFile(output / "losses.jsonl", identity, self.scanners, config.overwrite)

    def run(self) -> dict[str, Any]:
        plans = {kind: make_plans(self.L, kind) for kind in self.config.what}
        steps = {kind: [to_steps(plan, self.base.config) for plan in plans[kind].values()] for kind in plans}
        found = self._measure("scan", [base_steps(self.L), *(one for some in steps.values() for one in some)])
        costs: dict[str, dict[str, Any]] = {name: {} for name in self.windows}
        for name, losses in found.items():
            rest = iter(loss - losses[0] for loss in losses[1:])
            for kind in plans:
                costs[name][kind] = [[*key, next(rest)] if kind in BLOCKS else next(rest) for key in plans[kind]]
        self.base_losses = {name: losses[0] for name, losses in found.items()}
        result = {
            "version": 1,
            "model": self.config.model,
            "base": {"layers": self.L, "digest": self.digest},
            "dtype": self.config.dtype,
            "window": self.config.window,
            "texts": {
                name: {"path": getattr(self.config, name), "tokens": int(rows.size), "loss": self.base_losses[name]}
                for name, rows in self.windows.items()
            },
            "costs": costs,
            "layers": layer_facts(self.scanners["text"]),
            "plans": self._find_plans(costs) if self.config.grow_to else {},
            "versions": sidecar.versions("tli_jax", "jax"),
        }
        self._write("scan.json", result)
        return result

    def _find_plans(self, costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Search the plans of ``grow_to``, and write them.

        The search minimises the distance from the base: the mean over the texts of the absolute cost. A negative cost
        is the luck of a text, and does not carry over to another.
        """
        kinds = [kind for kind in DOUBLINGS if kind in self.config.what]

        def distance(kind: str, layer: int) -> float:
            return sum(abs(of_text[kind][layer]) for of_text in costs.values()) / len(costs)

        best = {layer: min(kinds, key=lambda kind: distance(kind, layer)) for layer in range(self.L)}
        single = {layer: distance(kind, layer) for layer, kind in best.items()}

        def measure(sets: Sequence[tuple[int, ...]]) -> list[float]:
            plans = [double(self.L, {layer: best[layer] for layer in chosen}) for chosen in sets]
            title = f"search {self.L + len(sets[0])} layers"
            losses = self._measure(title, [to_steps(plan, self.base.config) for plan in plans])
            changes = [[abs(x - self.base_losses[name]) for x in losses[name]] for name in losses]
            return [sum(of_plan) / len(changes) for of_plan in zip(*changes, strict=True)]

        found, plans = find_layers(single, [depth - self.L for depth in self.config.grow_to], measure), {}
        for depth in self.config.grow_to:
            chosen, distance_of_plan = found[depth - self.L]
            doubled = {layer: best[layer] for layer in chosen}
            # Names alone: the plan becomes part of a model that others may read.
            texts = ", ".join(Path(getattr(self.config, name)).name for name in self.windows)
            options = {"distance": distance_of_plan, "texts": texts, "tokens": self.config.tokens}
            plan = double(self.L, doubled, options)
            name = "plan.json" if len(self.config.grow_to) == 1 else f"plan-{depth}.json"
            self._write(name, plan.to_json())
            losses = self._measure("search", [to_steps(plan, self.base.config)])
            plans[str(depth)] = {
                "file": name,
                "doubled": {str(layer): kind for layer, kind in doubled.items()},
                "distance": distance_of_plan,
                "costs": {name: losses[name][0] - self.base_losses[name] for name in losses},
            }
        return plans

    def _measure(self, title: str, plans: Sequence[Steps]) -> dict[str, list[float]]:
        """The losses of plans on every text."""
        missing = sum(len(self.file.missing(name, plans)) for name in self.windows)
        if not missing or not processes.is_first():
            return {name: self.file.losses(name, plans, lambda amount: None) for name in self.windows}
        with progress(title, missing, "plans") as advance:
            return {name: self.file.losses(name, plans, advance) for name in self.windows}

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        if not processes.is_first():
            return
        with storage_errors(self.output / name), replace_file(self.output / name) as temporary:
            temporary.write_text(to_json(content) + "\n", encoding="utf-8")


def make_plans(layers: int, kind: str) -> dict[tuple[int, ...], Plan]:
    """The plans of one word of ``what``, by layer or by the first and last layer of a block."""
    if kind in BLOCKS:
        blocks = [(first, last) for first in range(layers) for last in range(first, layers)]
        return {block: repeat_block(layers, *block, BLOCKS[kind]) for block in blocks}
    if kind == "bypass":
        return {(layer,): bypass(layers, layer) for layer in range(layers)}
    return {(layer,): double(layers, {layer: kind}) for layer in range(layers)}


def _read_windows(name: str, path: str, config: ScanConfig, base: Checkpoint, tokenizer: Tokenizer) -> np.ndarray:
    """The start of a text as windows of token ids."""
    if path == hub.EMBEDDED and not Path(path).exists():
        text = "\n".join(topics() if name == "text" else held_out_modules())
    else:
        text = read_plain(Path(path))
    ids = tokenizer.encode(text[: _LONGEST * config.tokens])
    return tokens.windows(ids, base.config, config.tokens, config.window)


def _shardings(config: ScanConfig, model: LlamaConfig) -> Any:
    """The sharding of every param, or None on a single device."""
    if len(jax.devices()) == 1:
        return None
    mesh = make_mesh(config.mesh)
    sizes = dict(model.sizes) | {"H": model.num_attention_heads, "K": model.num_key_value_heads}
    check_fits(mesh, sizes, mesh.devices.size)
    dims = {f"layers.{name}": ("L", *dims) for name, dims in model.layer_tensors.items()} | model.outer_tensors
    return nest({name: param_sharding(mesh, letters) for name, letters in dims.items()})
