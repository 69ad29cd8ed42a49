"""What a folder holds that the report can show, recognised by its records."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tli_jax.cli.console import printable
from tli_jax.errors import MissingInputError
from tli_jax.hf.inputs import parse_json
from tli_jax.hf.records import TRAINING, read_growth, read_training
from tli_jax.reporting.run import Lines, read_run
from tli_jax.training.run_directory import RunDirectory


class Trained(NamedTuple):
    """A trained model: its ``training.json`` and, where it was grown, its ``growth.json``."""

    facts: Mapping[str, Any]
    growth: Mapping[str, Any] | None


@dataclasses.dataclass
class Found:
    """The folders of a report by kind, each under a name of its own."""

    runs: dict[str, Lines] = dataclasses.field(default_factory=dict)
    grown: dict[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    trained: dict[str, Trained] = dataclasses.field(default_factory=dict)
    comparisons: dict[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def find(folders: Sequence[str]) -> Found:
    """Read the records of all folders.

    Raises:
        MissingInputError: a folder holds nothing to report on.
        DataError: a record is not JSON, or a run has no metrics yet.
    """
    found = Found()
    for folder, name in label(folders).items():
        path = Path(folder)
        if (path / "results.json").is_file():
            # A comparison has more to tell than a model: no limit on the size of its record.
            file = path / "results.json"
            found.comparisons[name] = parse_json(file.read_bytes(), str(file))
        elif (path / "measured").is_dir() and not (path / "run.json").is_file():
            raise MissingInputError(f"{folder}: a comparison without results yet: run tli_jax.compare to its end")
        elif RunDirectory(folder).is_begun:
            found.runs[name] = read_run(folder)
        elif (path / TRAINING).is_file():
            growth = read_growth(path / "growth.json") if (path / "growth.json").is_file() else None
            found.trained[name] = Trained(read_training(path / TRAINING), growth)
        elif (path / "growth.json").is_file():
            found.grown[name] = read_growth(path / "growth.json")
        else:
            raise MissingInputError(
                f"{folder}: nothing to report on: neither a run, nor a grown or trained model (growth.json,"
                " training.json), nor a comparison (results.json)"
            )
    return found


def label(folders: Sequence[str]) -> dict[str, str]:
    """Each folder under its name, with as many of its parents as it takes to tell it from the others."""

    def parts(folder: str) -> tuple[str, ...]:
        # Not resolved: two links are two names, and where links go in circles nothing else would work.
        return tuple((folder.rstrip("/") if "://" in folder else os.path.abspath(folder)).split("/"))  # noqa: PTH100

    different: dict[tuple[str, ...], str] = {}
    for folder in folders:
        different.setdefault(parts(folder), folder)
    names = {}
    for mine, folder in different.items():
        others = [other for other in different if other != mine]
        depth = next(n for n in range(1, len(mine) + 2) if all(other[-n:] != mine[-n:] for other in others))
        names[folder] = printable("/".join(mine[-depth:]))
    return names
