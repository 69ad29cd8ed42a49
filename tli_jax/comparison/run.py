"""Doing a comparison: what is there is not done again.

::

    OUTPUT/config.yaml     the configuration as resolved
    OUTPUT/grown/          the grown models
    OUTPUT/runs/           a run folder of tli_jax.train for each contender, what trains in it, and seed
    OUTPUT/measured/       what was found of each, one file each: what is there is not done again
    OUTPUT/logs/           what growing and training printed
    OUTPUT/data/, compiled/   text as token ids, and programs, which the runs share
    OUTPUT/results.json, results.csv, report.html, *.png
"""

import dataclasses
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.cli.config import CompareConfig, Recipe, UpscaleConfig
from tli_jax.cli.console import logging_to, say, warn
from tli_jax.cli.parse import difference, from_yaml, growth_config
from tli_jax.cli.progress import Advance, progress
from tli_jax.cli.yaml_file import plain, to_yaml
from tli_jax.comparison.contenders import BASE, OLD_LAYERS, RANDOM, Contender, make_contenders
from tli_jax.comparison.statistics import analyse
from tli_jax.distributed import processes
from tli_jax.errors import DataError, DivergedError, OutputError, UsageError
from tli_jax.evaluation.tasks import open_tasks
from tli_jax.hf import hub, sidecar, tokens
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.grown_config import grown_config
from tli_jax.hf.inputs import read_json
from tli_jax.models.config import LlamaConfig
from tli_jax.reporting.page import need_libraries, write_report
from tli_jax.training.metrics import read_metrics, validation
from tli_jax.training.run_directory import RunDirectory, model_digest, replacing
from tli_jax.training.setup import make_trainer, open_text, replace_embedded, sequence_length
from tli_jax.training.train import Trained, train
from tli_jax.upscaling.job import grow, prepare

if TYPE_CHECKING:
    from tli_jax.data.batches import Data
    from tli_jax.training.step import Trainer

_PACKAGES = ("tli_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# What may be another when a comparison is gone on with: what was measured stays what it is.
_MAY_CHANGE = ("methods", "seeds", "only", "baselines", "output", "text", "validation_text", "old_text")  # by digest


def compare(config: CompareConfig, call: str) -> dict[str, Any]:
    """Grow, train and measure what is not there yet, and write the results.

    Args:
        call: the command, for the record.

    Returns:
        What ``results.json`` says.

    Raises:
        TliError: a wrong option, or whatever ends a growth or a run early; but for a run that diverges, which is a
            result.
    """
    for key in ("model", "output", "text", "methods"):
        if not getattr(config, key):
            raise UsageError(f"{key} is not set, see --help")
    need_libraries()
    output = Path(config.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output {output}: cannot be created ({error.strerror}): choose another") from error
    with processes.lock(output):
        return _Comparison(config, output).finish(call)


class _Comparison:
    """The folder of a comparison, and what is done in it."""

    def __init__(self, config: CompareConfig, output: Path):
        self.config, self.output = config, output
        self._check_folder()
        self.base = open_checkpoint(hub.resolve(config.model, config.revision))
        parse_special = config.special_tokens == "parse"
        self.tokenizer, warnings = tokens.open_tokenizer(self.base.folder, self.base.config, parse_special)
        for warning in warnings:
            warn(warning)
        for name in ("data", "grown", "runs", "measured", "logs"):
            (output / name).mkdir(exist_ok=True)
        self.contenders, self.left_out = make_contenders(config, self.base)
        self.recipe = config.recipe
        self.new, self.old = self._read(self.recipe), self._read_old_text()
        for note in (*self.new.notes, *(self.old.notes if self.old else ())):
            say(note)
        if not self.new.validation_windows:
            raise UsageError(
                "nothing is kept out to measure on: give validation_text, or a validation_fraction above 0"
            )
        self.tasks = open_tasks(config.tasks)
        if self.tasks and self.tokenizer is None:
            raise UsageError(f"tasks: {self.base.folder} has no tokenizer to read them with")
        self.before: dict[Path, dict[str, Any]] = {}
        # What was measured belongs to them.
        self.facts = {
            "model": model_digest(self.base),
            "text": self.new.digest,
            "old_text": self.old and self.old.digest,
            "tasks": {task.name: task.digest for task in self.tasks},
        }

    def _check_folder(self) -> None:
        file = self.output / "config.yaml"
        if file.is_file():
            if what := difference(from_yaml(CompareConfig, file), self.config, _MAY_CHANGE):
                raise UsageError(
                    f"output {self.output}: was started otherwise: {what}: change it back, or use another output"
                )
        elif foreign := sorted(one.name for one in self.output.iterdir() if one.name != "lock"):
            raise OutputError(f"output {self.output}: is not a comparison and not empty ({foreign[0]}): choose another")
        with replacing(file) as temporary:
            temporary.write_text(to_yaml(self.config), encoding="utf-8")

    def _read(self, recipe: Recipe) -> "Data":
        model = self.base.config
        T = sequence_length(recipe, model)
        return open_text(recipe, model, self.base.folder, self.tokenizer, T, self.output / "data")

    def _read_old_text(self) -> "Data | None":
        """All of it for validation. The word ``embedded`` is the modules held out of the embedded base's training."""
        file = self.output / "data" / "modules.jsonl"
        old = self.config.old_text
        found = replace_embedded(old, self.config.field, file, tokens.held_out_modules)
        return self._read(dataclasses.replace(self.recipe, text=found, validation_text=found)) if found else None

    def finish(self, call: str) -> dict[str, Any]:
        """Do what is not done, and write down all."""
        import jax

        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            # Every seed runs the same programs, and many methods too.
            jax.config.update("jax_compilation_cache_dir", str((self.output / "compiled").resolve()))
        starts = [
            self._start(contender, seed)
            for contender in self._with_progress("grow", self.contenders)
            for seed in (self.seeds if contender.is_drawn else self.seeds[:1])
        ]
        wanted = [
            (contender, only, seed)
            for seed in self.seeds  # outermost: stopped early, it has all contenders with fewer seeds
            for contender in self.contenders
            for only in self.config.only
            if only in contender.only and self.config.steps
        ]
        runs = []
        if wanted:
            with progress("train", len(wanted) * self.config.steps, "steps") as advance:
                runs = [self._run(*one, advance) for one in wanted]
        base = next(start for start in starts if start["name"] == BASE)
        results = {
            "version": 1,
            "command": call,
            "config": plain(dataclasses.asdict(self.config)),
            "base": {"layers": self.base.config.num_hidden_layers, "new": base["new"], "old": base["old"]},
            "size": self._size().num_params,
            "left_out": self.left_out,
            "starts": starts,
            "runs": runs,
            "machine": _machine(),
            "versions": sidecar.versions(*_PACKAGES),
        }
        results |= analyse(results)
        _write(self.output / "results.json", results)
        write_report(results, to_yaml(self.config), self.output)
        return results

    @property
    def seeds(self) -> list[int]:
        return [self.config.seed + i for i in range(self.config.seeds)]

    def _size(self) -> LlamaConfig:
        layers = self.base.config.num_hidden_layers
        return self.base.config.with_layers(layers + layers // self.config.every)

    def _with_progress(self, title: str, items: Sequence[Contender]) -> Iterator[Contender]:
        with progress(title, len(items), "models") as advance:
            for item in items:
                advance(0, item.name)
                yield item
                advance(1, item.name)

    def _folder(self, contender: Contender, seed: int) -> Path | str:
        """Where the model of a contender is; for the base, what it goes by."""
        if contender.name in (BASE, OLD_LAYERS):
            return self.config.model
        name = contender.file_name
        return self.output / "grown" / (f"{name}-{seed}" if contender.is_drawn else name)

    def _start(self, contender: Contender, seed: int) -> dict[str, Any]:
        """A model before any training: made, proved, and its losses."""
        file = self.output / "measured" / f"start-{contender.file_name}-{seed}.json"
        if file.is_file():
            found = read_json(file)
            for key, value in self.facts.items():
                if found["facts"][key] != value:
                    what = f"the {key} is not what it was started with"
                    raise UsageError(f"output {self.output}: {what}: bring it back, or use another output")
            if found["growth"] != contender.growth:
                raise UsageError(
                    f"methods: {contender.name} was {found['growth']} in {self.output}, is {contender.growth}:"
                    " give it another name, or use another output"
                )
            return found
        with (self.output / "logs" / f"{file.stem}.txt").open("w", encoding="utf-8") as log, logging_to(log):
            made = self._make(contender, seed)
            folder = Path(hub.resolve(self._folder(contender, seed), self.config.revision))
            if folder not in self.before:  # two of the baselines begin as the base
                try:
                    self.before[folder] = self._measure_start(folder)
                except DataError as error:  # its loss is not finite, say
                    raise DataError(f"{contender.name} ({folder}): {error}") from error
        found = {"name": contender.name, "seed": seed, "method": contender.method, "growth": contender.growth}
        found |= {"is_drawn": contender.is_drawn, **made, **self.before[folder], "facts": self.facts}
        _write(file, found)
        return found

    def _make(self, contender: Contender, seed: int) -> dict[str, Any]:
        """Grow, or draw, the model, and say what it is."""
        folder = self._folder(contender, seed)
        if contender.method is None:
            config = self._size() if contender.name == RANDOM else self.base.config
            if contender.name == RANDOM:
                self._draw(config, seed, Path(folder))
            return _sizes(config) | {"plan": None, "proof": None, "seconds": 0.0}
        growth = self._growth_of(contender, seed)
        job = prepare(growth)
        seconds: dict[str, float] = {}
        record = grow(job, seconds)
        return {
            **_sizes(grown_config(self.base.config, job.plan)),
            "plan": job.plan.to_json(),
            "proof": record["proof"],
            "seconds": sum(value for name, value in seconds.items() if name != "proof"),
        }

    def _growth_of(self, contender: Contender, seed: int) -> UpscaleConfig:
        values = contender.growth | {"model": self.config.model, "revision": self.config.revision}
        values |= {"output": str(self._folder(contender, seed)), "overwrite": True}
        values |= {"seed": seed} if contender.is_drawn else {}
        return growth_config(values, f"methods: {contender.name}")

    def _draw(self, config: LlamaConfig, seed: int, folder: Path) -> None:
        """A model from random weights, in the dtype of the base."""
        import jax
        import jax.numpy as jnp

        from tli_jax.hf.save import save_hf
        from tli_jax.models.llama import init_params

        params = jax.jit(lambda key: init_params(config, key, jnp.dtype(config.dtype)))(jax.random.key(seed))
        save_hf(folder, config, params, source=self.base.folder, overwrite=True)

    def _measure_start(self, folder: Path) -> dict[str, Any]:
        """Of a model as it is: its loss on the new text and on the old one, and its tasks."""
        from tli_jax.training.loop import Feed, load

        weights = open_checkpoint(folder)
        trainer, _, _ = make_trainer(self.recipe, weights.config, None)
        arrays = load(trainer, weights)
        old = self.old and Feed(trainer, self.old).validate(*arrays)
        return {"new": Feed(trainer, self.new).validate(*arrays), "old": old} | self._score(trainer, *arrays)

    def _score(self, trainer: "Trainer", trained: Any, frozen: Any) -> dict[str, Any]:
        """Each task, and the mean of their accuracies."""
        if not self.tasks:
            return {"tasks": {}, "accuracy": None}
        from tli_jax.evaluation import scoring

        assert self.tokenizer is not None
        tasks = scoring.evaluate(trainer, (trained, frozen), self.tokenizer, self.tasks)
        return {"tasks": tasks, "accuracy": statistics.fmean(task["accuracy"] for task in tasks.values())}

    def _run(self, contender: Contender, only: str, seed: int, advance: Advance) -> dict[str, Any]:
        """Train one, and measure what came of it."""
        name = f"{contender.file_name}-{only}-{seed}"
        shown = f"{contender.name}, {only}, seed {seed}"
        file, steps = self.output / "measured" / f"{name}.json", self.config.steps
        if file.is_file():
            advance(steps, shown)
            return read_json(file)
        run = RunDirectory(self.output / "runs" / name)
        model = str(self._folder(contender, seed))
        config = dataclasses.replace(
            self.recipe, model=model, run=str(run), only=contender.only[only], seed=seed, keep=1
        )
        done = len(read_metrics(run))
        advance(done, shown)
        found: dict[str, Any] = {"name": contender.name, "only": only, "seed": seed}
        with (self.output / "logs" / f"{name}.txt").open("a", encoding="utf-8") as log, logging_to(log):
            try:
                trained = train(config, self.output / "data", lambda n, note="", /: advance(n, f"{shown} · {note}"))
                found |= {"diverged": None} | self._measure(trained, run)
            except DivergedError as error:
                found |= {"diverged": str(error)}
        _write(file, found)
        return found

    def _measure(self, run: Trained, folder: RunDirectory) -> dict[str, Any]:
        """What is known of a run that is done.

        Raises:
            DivergedError: a loss of the trained model is not finite.
        """
        import jax

        from tli_jax.training.loop import Feed, contributions
        from tli_jax.training.memory import compile_step

        trainer, trained, frozen, data = run
        assert data is not None, "it was not only exported"
        lines, held = read_metrics(folder), trained | frozen
        curve = validation(lines)
        if bad := [tokens for tokens, loss in curve if loss is None]:
            raise DivergedError(f"the validation loss is not finite after {bad[0]:,} tokens")
        feed = Feed(trainer, data)
        batches = max(1, self.recipe.validation_batches // 4)
        try:
            measured = {
                "old": self.old and Feed(trainer, self.old).validate(trained, frozen),
                **self._score(trainer, trained, frozen),
                "contributions": contributions(feed, trained, frozen, batches),
            }
        except DataError as error:  # not finite: before training this text and these tasks could be measured
            raise DivergedError(f"the trained model cannot be measured: {error}") from error
        found = {
            "curve": curve,
            **measured,
            "seconds": sum(self.recipe.batch_size * data.T / line["tokens_per_second"] for line in lines),
            "trained_parameters": sum(array.size for array in trained.values()),
            "flops_per_token": trainer.flops_per_token(data.T),
            "memory": compile_step(trainer, data.T, lambda leaf: held[leaf.name].dtype).peak,
        }
        jax.clear_caches()  # of this run's programs, or hundreds of runs would hold all of theirs
        return found


def _write(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    with replacing(file) as temporary:
        sidecar.write_json(temporary, content)


def _sizes(config: LlamaConfig) -> dict[str, Any]:
    return {
        "layers": config.num_hidden_layers,
        "parameters": config.num_params,
        "active_parameters": config.num_active_params,
        "forward_flops_per_token": config.flops_per_token(min(config.max_position_embeddings, 2048)),
    }


def _machine() -> dict[str, Any]:
    import jax

    device = jax.devices()[0]
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "devices": f"{jax.device_count()} × {device.device_kind}",
    }
