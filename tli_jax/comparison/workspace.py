"""The output folder of a comparison, and the inputs that all of its models share.

::

    OUTPUT/config.yaml     the resolved configuration
    OUTPUT/grown/          the grown models
    OUTPUT/runs/           a run directory for each contender, choice of trainable layers, and seed
    OUTPUT/measured/       one file of results per model and run; what is measured is not measured again
    OUTPUT/logs/           the output of growth and training
    OUTPUT/data/, compiled/   token ids and compiled programs, shared by all runs
    OUTPUT/results.json, results.csv, report.html, *.png
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.cli.config import CompareConfig
from tli_jax.cli.console import say, warn
from tli_jax.cli.fields import difference
from tli_jax.cli.parse import from_yaml
from tli_jax.cli.yaml_file import to_yaml
from tli_jax.comparison.contenders import Contender, make_contenders
from tli_jax.data.embedded import held_out_modules
from tli_jax.errors import OutputError, UsageError
from tli_jax.evaluation.tasks import open_tasks
from tli_jax.hf import hub, sidecar
from tli_jax.hf.checkpoint import model_digest, open_checkpoint
from tli_jax.hf.files import replace_file, storage_errors
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.models.config import LlamaConfig
from tli_jax.reporting.results import BASE, OLD_LAYERS
from tli_jax.training.text import open_text, replace_embedded, sequence_length

if TYPE_CHECKING:
    from tli_jax.data.batches import Data

# Keys that may differ when a comparison is resumed: they do not change what was measured. Texts go by their digest.
_MAY_CHANGE = ("methods", "seeds", "only", "baselines", "output", "text", "validation_text", "old_text", "verify")
_MAY_CHANGE += ("keep_checkpoints",)
# The learning rate is chosen with a seed that no run uses: a comparison has at most a thousand.
_TRIAL_SEED = 1_000_000


class Workspace:
    """The opened folder.

    Attributes:
        new, old: the text that is trained on, and the text of the base's own domain if given.
        digests: of all inputs on which the measurements depend.

    Raises:
        UsageError: an option is invalid, or the folder holds a comparison with other settings.
        OutputError: the folder holds something else.
    """

    def __init__(self, config: CompareConfig, output: Path):
        self.config, self.output = config, output
        self._write_config()
        self.base = open_checkpoint(hub.resolve(config.model, config.revision))
        parse_special = config.special_tokens == "parse"
        self.tokenizer, warnings = open_tokenizer(self.base.folder, self.base.config, parse_special)
        for warning in warnings:
            warn(warning)
        for name in ("data", "grown", "runs", "measured", "logs"):
            (output / name).mkdir(exist_ok=True)
        self.contenders, self.left_out = make_contenders(config, self.base)
        self.seeds = [config.seed + i for i in range(config.seeds)]
        self.trial_seed = config.seed + _TRIAL_SEED
        layers = self.base.config.num_hidden_layers
        self.size: LlamaConfig = self.base.config.with_layers(layers + layers // config.every)
        self.recipe = config.recipe
        if self.recipe.validation_batches < config.validation_batches:
            say(
                f"validation: {self.recipe.validation_batches} batches instead of {config.validation_batches}, which"
                " would read more tokens than a run trains on"
            )
        self.new, self.old = self._open_text(), self._open_old_text()
        for note in (*self.new.notes, *(self.old.notes if self.old else ())):
            say(note)
        if not self.new.validation_windows:
            raise UsageError("no held-out text to measure the loss on: set validation_text, or validation_fraction > 0")
        self.tasks = open_tasks(config.tasks)
        if self.tasks and self.tokenizer is None:
            raise UsageError(f"tasks: {self.base.folder} has no tokenizer: add one, or omit the tasks")
        self.digests = {
            "model": model_digest(self.base),
            "text": self.new.digest,
            "old_text": self.old and self.old.digest,
            "tasks": {task.name: task.digest for task in self.tasks},
        }

    def _write_config(self) -> None:
        file = self.output / "config.yaml"
        # A comparison that failed before its first growth or measurement may be corrected.
        is_begun = any(any((self.output / name).glob("*")) for name in ("grown", "measured"))
        if file.is_file():
            if is_begun and (changes := difference(from_yaml(CompareConfig, file), self.config, _MAY_CHANGE)):
                raise UsageError(
                    f"output {self.output}: holds a comparison with other settings: {changes}: change them back, or"
                    " choose another output"
                )
        elif foreign := sorted(path.name for path in self.output.iterdir() if path.name != "lock"):
            raise OutputError(f"output {self.output}: is not a comparison and not empty ({foreign[0]}): choose another")
        with storage_errors(file), replace_file(file) as temporary:
            temporary.write_text(to_yaml(self.config), encoding="utf-8")

    def _open_text(self, **changes: Any) -> "Data":
        recipe, model = dataclasses.replace(self.recipe, **changes), self.base.config
        T = sequence_length(recipe, model)
        return open_text(recipe, model, self.base.folder, self.tokenizer, T, self.output / "data")

    def _open_old_text(self) -> "Data | None":
        """The old text, all of it for validation. ``embedded`` means the modules held out of the embedded base."""
        file = self.output / "data" / "modules.jsonl"
        sources = replace_embedded(self.config.old_text, self.config.field, file, held_out_modules)
        return self._open_text(text=sources, validation_text=sources) if sources else None

    def model_path(self, contender: Contender, seed: int) -> Path | str:
        """The folder of a contender's model. For the base it is the configured name, which may be a Hub id."""
        if contender.name in (BASE, OLD_LAYERS):
            return self.config.model
        return self.output / "grown" / (f"{contender.file_name}-{seed}" if contender.is_random else contender.file_name)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a file atomically."""
    with storage_errors(file), replace_file(file) as temporary:
        sidecar.write_json(temporary, content)
