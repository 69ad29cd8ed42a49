"""A comparison from start to end: grow, train and measure what is missing, then analyse and report."""

import dataclasses
import os
import platform
from pathlib import Path
from typing import Any

from tli_jax.cli.config import CompareConfig
from tli_jax.cli.yaml_file import plain, to_yaml
from tli_jax.comparison.rates import choose_rates
from tli_jax.comparison.runs import Records, train_all
from tli_jax.comparison.starts import measure_starts
from tli_jax.comparison.statistics import analyse
from tli_jax.comparison.workspace import Workspace, write_json
from tli_jax.errors import OutputError, UsageError
from tli_jax.hf import sidecar
from tli_jax.reporting.page import require_libraries, write_report
from tli_jax.reporting.results import BASE
from tli_jax.training.run_directory import lock_directory

_PACKAGES = ("tli_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def compare(config: CompareConfig, command: str) -> dict[str, Any]:
    """Run a comparison, or resume it, and write its results and its report.

    Args:
        command: the command line, for the record.

    Returns:
        The content of ``results.json``.

    Raises:
        TliError: an option is invalid, or a growth or a run fails. A run that diverges is a result, not an error.
    """
    for key in ("model", "output", "text", "methods"):
        if not getattr(config, key):
            raise UsageError(f"{key} is not set, see --help")
    if config.learning_rates and len(config.learning_rate) > 1:
        raise UsageError("learning_rates sets one rate for all layers: remove the groups from learning_rate")
    require_libraries()
    output = Path(config.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output {output}: cannot be created ({error.strerror}): choose another") from error
    with lock_directory(output):
        space = Workspace(config, output)
        _cache_compilations(output / "compiled")
        starts = measure_starts(space)
        rates, trials = choose_rates(space, starts)
        results = _collect(space, command, starts, trials, train_all(space, starts, rates))
        write_json(output / "results.json", results)
        write_report(results, to_yaml(config), output)
        return results


def _cache_compilations(folder: Path) -> None:
    """Keep compiled programs: all seeds run the same ones, and so do many methods."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # each run needs dozens of small programs


def _collect(space: Workspace, command: str, starts: Records, trials: Records, runs: Records) -> dict[str, Any]:
    import jax

    base = next(start for start in starts if start["name"] == BASE)
    results = {
        "version": 1,
        "command": command,
        "config": plain(dataclasses.asdict(space.config)),
        "base": {"layers": space.base.config.num_hidden_layers, "new": base["new"], "old": base["old"]},
        "size": space.size.num_params,
        "left_out": space.left_out,
        "validation_batches": space.recipe.validation_batches,
        "starts": [start for start in starts if start["seed"] in space.seeds],
        "learning_rates": trials,
        "runs": runs,
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        },
        "versions": sidecar.versions(*_PACKAGES),
    }
    return results | analyse(results)
