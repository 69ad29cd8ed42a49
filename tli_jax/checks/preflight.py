"""``python -m tli_jax.preflight``: will this run fit, and start, over there? Writes nothing and starts nothing.

What ``upscale`` and ``train`` would do is checked as far as this machine can: configuration, headers of the model, the
plan, room on the disks, data, processes; and the growth and the very train step are compiled, for the devices that are
here or for a TPU slice that is not.
"""

import dataclasses
import os
import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.filesize import decimal as _bytes

from tli_jax.cli.config import PreflightConfig, TrainConfig
from tli_jax.cli.console import console, warn
from tli_jax.distributed import processes, topology
from tli_jax.errors import TliError, UsageError
from tli_jax.growth.plan import HOST_INITS, Plan
from tli_jax.hf import hub, tokens
from tli_jax.hf.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from tli_jax.hf.grown_config import grown_config
from tli_jax.hf.grown_tensors import grown_tensors
from tli_jax.hf.output import check_output
from tli_jax.hf.tensors import CODES, Tensor
from tli_jax.models.shapes import check_shape, read_shape
from tli_jax.training.run_directory import RunDirectory
from tli_jax.training.setup import make_trainer
from tli_jax.upscaling.options import make_plan

if TYPE_CHECKING:
    from tli_jax.training.step import Trainer

PROGRAM = "python -m tli_jax.preflight"
_SAMPLE = 2**20  # characters of each source that are tokenised, to guess at the rest


class _NotCheckedError(Exception):
    """What would be checked is not here; the message says what is missing."""


class _DoesNotFitError(UsageError):
    def __init__(self, message: str, facts: dict[str, Any]):
        super().__init__(message)
        self.facts = facts


@dataclasses.dataclass
class Finding:
    """What became of one check. ``status`` is ok, fails or not checked."""

    name: str
    status: str
    text: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: TliError | None = None


class Preflight:
    """The checks of one run, each of which may build on what those before it found."""

    def __init__(self, config: PreflightConfig):
        self.config = config
        self.grows = config.output is not None or config.train is None
        self.base: Checkpoint | None = None
        self.plan: Plan | None = None
        self.trainer: Trainer | None = None
        self.T = 0
        # Where bytes will be written: what for, where, how many.
        self.writes: list[tuple[str, Path, int]] = []

    def run(self) -> list[Finding]:
        """All checks, each printed as it is done."""
        checks: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {"model": self.model}
        if self.grows:
            checks["growth"] = self.growth
        checks["processes"] = self.processes
        if self.config.train is not None:
            checks |= {"mesh": self.mesh, "run": self.run_folder, "data": self.data}
        checks["disk"] = self.disk
        if self.grows:
            checks["growth compiles"] = self.growth_compiles
        if self.config.train is not None:
            checks["step compiles"] = self.search if self.config.search else self.step_compiles
        findings = []
        screen = console(is_stderr=self.config.json)
        for name, check in checks.items():
            found = self._run_one(name, check)
            findings.append(found)
            if processes.is_first():
                screen.print(f"{name:<15} {found.status:<11} {found.text}", soft_wrap=True)
        return findings

    def _run_one(self, name: str, check: Callable[[], tuple[str, dict[str, Any]]]) -> Finding:
        try:
            text, facts = check()
        except _NotCheckedError as why:
            return Finding(name, "not checked", str(why))
        except TliError as error:
            facts = error.facts if isinstance(error, _DoesNotFitError) else {}
            return Finding(name, "fails", str(error), facts, error)
        return Finding(name, "ok", text, facts)

    @property
    def train(self) -> TrainConfig:
        assert self.config.train is not None
        return self.config.train

    def model(self) -> tuple[str, dict[str, Any]]:
        config = self.config
        name = config.model if self.grows or config.train is None else config.train.model or config.model
        if not name and config.shape is None:
            raise UsageError(
                "model is not set: --model FOLDER, a hub id or 'embedded', or a shape: --shape llama3.1-8b"
            )
        is_here = name == hub.EMBEDDED or (name != "" and Path(name).expanduser().is_dir())
        if config.shape is not None and not is_here:
            self.base = _from_shape(config.shape)
            told = config.shape if isinstance(config.shape, str) else "the shape that was given"
            raise _NotCheckedError(f"{name or 'no model'} is not here: going by {told}, {_describe(self.base)}")
        self.base = open_checkpoint(hub.resolve(name, config.revision, headers_only=True))
        check_shape(self.base.config, config.shape, name)
        for warning in self.base.warnings:
            warn(warning)
        return f"{name}: {_describe(self.base)}, headers agree with config.json", {}

    def growth(self) -> tuple[str, dict[str, Any]]:
        base = self._needs(self.base, "a model")
        if not self.config.output:
            raise UsageError("output is not set: the folder that growth writes")
        # Where a plan depends on weights, which layers it names changes nothing that is checked here.
        anything = [0.0] * base.config.num_hidden_layers
        self.plan = plan = make_plan(self.config, base, anything)
        pieces = grown_tensors(base, plan)
        nbytes = sum(piece.nbytes for piece in pieces)
        self.writes.append(("grown model", Path(self.config.output), nbytes))
        has_begun = self.config.train is not None and self.config.train.run and RunDirectory(self.train.run).is_begun
        if not has_begun:
            check_output(Path(self.config.output), _folder(base), self.config.overwrite)
        before, after = base.config.num_params, grown_config(base.config, plan).num_params
        text = f"{plan.method}: {plan.base_layers} → {len(plan)} layers, {_count(before)} → {_count(after)} parameters"
        return f"{text}, {_bytes(nbytes)} to write", {"parameters": after, "bytes": nbytes}

    def processes(self) -> tuple[str, dict[str, Any]]:
        """Versions and devices of every process; all must have the same versions."""
        names = ("tli_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
        versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in names}
        if topology.has_compiler():
            versions["libtpu"] = metadata.version("libtpu")
        if self.config.topology and not (self.config.train and (self.train.distributed or self.train.process)):
            return f"this one alone, {_list(versions)}", {"versions": versions}
        import jax

        here = {"versions": versions, "devices": [device.device_kind for device in jax.local_devices()]}
        everyone = processes.gather_json(here)
        differing = [i for i, other in enumerate(everyone) if other["versions"] != versions]
        if differing:
            other = everyone[differing[0]]["versions"]
            what = ", ".join(f"{k} {v} and {other.get(k)}" for k, v in versions.items() if other.get(k) != v)
            raise UsageError(f"processes: process {differing[0]} has other versions: {what}: install the same on all")
        kinds = {kind for other in everyone for kind in other["devices"]}
        counts = sorted({len(other["devices"]) for other in everyone})
        if len(kinds) > 1 or len(counts) > 1:
            raise UsageError(f"processes: devices differ: {', '.join(sorted(kinds))}, {counts} a process")
        text = f"{len(everyone)} with {counts[0]} × {min(kinds)} each, {_list(versions)}"
        return text, {"versions": versions, "processes": len(everyone), "devices": counts[0], "kind": min(kinds)}

    def mesh(self) -> tuple[str, dict[str, Any]]:
        from tli_jax.distributed.mesh import batch_degree

        base = self._needs(self.base, "a model")
        model, plan = base.config, self.plan
        if plan is not None:
            model = grown_config(model, plan)
        elif self.grows:
            raise _NotCheckedError("needs a plan")
        elif base.growth is not None:
            plan = Plan.from_json(base.growth)
        self.trainer, self.T, notes = make_trainer(self.train, model, plan, self._devices())
        trainer, mesh = self.trainer, self.trainer.mesh
        sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        rows = trainer.config.batch_size // trainer.config.grad_accum_steps // batch_degree(mesh)
        text = f"{sizes} of {mesh.size} × {mesh.devices.flat[0].device_kind}, {rows} × {self.T:,} tokens a device at a"
        text += f" time, {trainer.config.grad_accum_steps} times a step; {'; '.join(notes)}"
        return text, {"mesh": dict(mesh.shape), "sequence_length": self.T, "sequences_a_device": rows}

    def run_folder(self) -> tuple[str, dict[str, Any]]:
        """What a run writes; and what is there of it already."""
        if not self.train.run:
            raise UsageError("run is not set: the folder of the run")
        import jax

        from tli_jax.training import memory as fit

        trainer = self._needs(self.trainer, "a mesh")
        params, whole = trainer.abstract_params(self._dtypes()), fit.whole_bytes
        frozen = sum(whole(params[leaf.name]) for leaf in trainer.param_specs if not leaf.trains)
        step = sum(map(whole, jax.tree.leaves(trainer.abstract_state())))
        nbytes = frozen + (self.train.keep + 1) * step
        run = RunDirectory(self.train.run)
        if run.remote is None:
            self.writes.append(("checkpoints", run.path, nbytes))
        if self.train.export:
            export = trainer.model.num_params * np.dtype(trainer.model.dtype).itemsize
            self.writes.append(("export", Path(self.train.export), export))
        steps = f"{self.train.keep + 1} × {_bytes(step)} a step"  # one is there while the next is being written
        text = f"checkpoints {_bytes(nbytes)}: what is frozen {_bytes(frozen)} once, {steps}"
        facts = {"frozen_bytes": frozen, "step_bytes": step, "checkpoint_bytes": nbytes}
        if run.is_begun:
            run.check_config(self.train)
            text += f"; {run} has begun, and goes on"
        return text, facts

    def data(self) -> tuple[str, dict[str, Any]]:
        from tli_jax.data.stream import Rules, guess_tokens

        trainer, base, train = self._needs(self.trainer, "a mesh"), self._needs(self.base, "a model"), self.train
        if not train.text:
            raise UsageError("text is not set: files or folders to train on, or 'embedded'")
        if all(source.path == hub.EMBEDDED for source in train.text):
            return "the text that the package carries", {}
        paths = [Path(source.path) for source in (*train.text, *train.validation_text) if source.path != hub.EMBEDDED]
        if absent := [str(path) for path in paths if not path.exists()]:
            raise _NotCheckedError(f"{', '.join(absent)}: not here")
        folder = _folder(base)
        parse = train.special_tokens == "parse"
        tokenizer = tokens.open_tokenizer(folder, base.config, parse)[0] if folder is not None else None
        rules = Rules(train, tokenizer, "", trainer.model.vocab_size, None, None)
        if tokenizer is None and any(path.suffix != ".npy" for path in paths):
            raise _NotCheckedError("text is here, a tokenizer is not")
        guesses = {str(path): guess_tokens(path, rules, _SAMPLE) for path in paths}
        total, needed = sum(guesses.values()), train.steps * train.batch_size * self.T
        if min(guesses.values()) <= self.T:
            raise UsageError(f"data: fewer tokens than one window takes, {self.T + 1:,}: give more text")
        text = f"about {total:,} tokens, by the first {_SAMPLE:,} characters of each source; all steps read {needed:,}"
        return text, {"tokens": total, "tokens_read": needed}

    def disk(self) -> tuple[str, dict[str, Any]]:
        """Of what goes to the same disk, the sum must fit."""
        if not self.writes:
            raise _NotCheckedError("it is not known what is written")
        disks: dict[int, list[tuple[str, Path, int]]] = {}
        for what, path, nbytes in self.writes:
            there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
            disks.setdefault(there.stat().st_dev, []).append((what, there, nbytes))
        texts, facts = [], []
        for parts in disks.values():
            needed, free = sum(nbytes for *_, nbytes in parts), shutil.disk_usage(parts[0][1]).free
            sums = " + ".join(f"{what} {_bytes(nbytes)}" for what, _, nbytes in parts)
            texts.append(f"{sums} = {_bytes(needed)}, {_bytes(free)} are free at {parts[0][1]}")
            facts.append({"needed": needed, "free": free, "at": str(parts[0][1])})
            if needed > free and (self.base is None or _folder(self.base) is None):
                raise _NotCheckedError(f"{texts[-1]}, but the model is not here, so it will be grown elsewhere")
            if needed > free:
                raise UsageError(f"disk: {texts[-1]}: make room, keep fewer checkpoints (--train.keep) or go elsewhere")
        return "; ".join(texts), {"disks": facts}

    def growth_compiles(self) -> tuple[str, dict[str, Any]]:
        from tli_jax.distributed.mesh import make_mesh
        from tli_jax.training import memory as fit

        base, plan = self._needs(self.base, "a model"), self._needs(self.plan, "a plan")
        on_host = sorted({row.init for row in plan.rows if row.init in HOST_INITS})
        if on_host:
            raise _NotCheckedError(f"init {', '.join(on_host)} works on the host, from file to file")
        mesh = self.trainer.mesh if self.trainer is not None else make_mesh({}, self._devices())
        return self._judge(fit.compile_growth(base.config, plan, mesh), mesh, "try a larger slice", {})

    def step_compiles(self) -> tuple[str, dict[str, Any]]:
        from tli_jax.training import memory as fit

        trainer = self._needs(self.trainer, "a mesh")
        found = fit.compile_step(trainer, self.T, self._dtypes())
        paper = fit.on_paper(trainer, self.T, self._dtypes())
        return self._judge(found, trainer.mesh, fit.hints(trainer, self.T), {"on_paper": paper})

    def search(self) -> tuple[str, dict[str, Any]]:
        from tli_jax.distributed.mesh import batch_degree
        from tli_jax.training import memory as fit

        trainer, screen = self._needs(self.trainer, "a mesh"), console(is_stderr=True)
        limit = self._limit(trainer.mesh)
        best = fit.search(trainer, self.T, self._dtypes(), limit, lambda line: screen.print(line, soft_wrap=True))
        if not best:
            raise UsageError(f"does not fit, whatever is computed again: {fit.hints(trainer, self.T)}")
        remat, size = next(iter(best.items()))
        parts = trainer.config.batch_size // (batch_degree(trainer.mesh) * size)
        flags = f"--train.remat {remat} --train.grad-accum-steps {parts}"
        text = f"sequences a device at a time, by remat: {_list(best)}; the cheapest: {flags}"
        return text, {"largest": best, "flags": flags}

    def _judge(self, found: Any, mesh: Any, hints: str, more: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        from tli_jax.training import memory as fit

        limit = self._limit(mesh)
        facts = dataclasses.asdict(found) | {"limit": limit} | more
        if not found.fits or found.peak > limit:
            raise _DoesNotFitError(
                f"does not fit: needs {fit.gib(found.peak)} of {fit.gib(limit)}; {hints}", facts | {"fits": False}
            )
        text = f"peak {fit.gib(found.peak)} of {fit.gib(limit)} a device (arguments {fit.gib(found.arguments)},"
        text += f" temporaries {fit.gib(found.temporaries)}), {_list(found.collectives) or 'no collectives'},"
        text += f" compiled in {found.seconds:.0f} s"
        if "on_paper" in more:
            paper = dict(more["on_paper"])
            text += f"; on paper {fit.gib(paper.pop('peak'))}: {_list({k: fit.gib(v) for k, v in paper.items()})}"
        return text, facts

    def _limit(self, mesh: Any) -> float:
        """Bytes of memory that a program can have on a device."""
        if self.config.topology:
            return topology.parse_topology(self.config.topology).hbm
        device = mesh.devices.flat[0]
        stats = device.memory_stats() if device.platform != "cpu" else None
        if stats:
            return stats["bytes_limit"]
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(device.client.local_devices())

    def _devices(self) -> list[Any] | None:
        if not self.config.topology:
            return None
        asked = topology.parse_topology(self.config.topology, self.config.slices)
        if not topology.has_compiler():
            raise _NotCheckedError(f"to compile for {asked} needs pip install 'tli_jax[tpu]'")
        return topology.compile_only_devices(asked)

    def _dtypes(self) -> Callable[[Any], Any]:
        base = self._needs(self.base, "a model")

        def stored(leaf: Any) -> Any:
            # Of the base, which may have fewer layers than what trains, and no experts yet.
            known = leaf.tensor in base.config.layer_tensors or not leaf.layers
            return base.stack(leaf.tensor if known else "mlp.gate_proj.weight", leaf.layers[:1] and (0,)).dtype

        return stored

    def _needs(self, value: Any, what: str) -> Any:
        if value is None:
            raise _NotCheckedError(f"needs {what}")
        return value


def _from_shape(shape: Any) -> Checkpoint:
    """As if a folder of that shape were here; only its headers are ever asked for."""
    config = read_shape(shape)
    dtype = np.dtype(config.dtype)
    sizes = {name: (dims, int(np.prod(dims)) * dtype.itemsize) for name, dims in expected_shapes(config).items()}
    nowhere = Path(os.devnull)
    tensors = {n: Tensor(n, nowhere, CODES[dtype], dims, 0, nbytes) for n, (dims, nbytes) in sizes.items()}
    return Checkpoint(nowhere, config, tensors)


def _folder(base: Checkpoint) -> Path | None:
    return base.folder if base.folder.is_dir() else None


def _describe(base: Checkpoint) -> str:
    config = base.config
    return f"{config.num_hidden_layers} layers, {_count(config.num_params)} parameters, {config.dtype}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e8 else f"{parameters / 1e6:.1f}M"


def _list(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())
