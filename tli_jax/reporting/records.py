"""Recognise what folders contain by their records, and read these."""

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
    """A trained model: its ``training.json``, and its ``growth.json`` if it was grown."""

    facts: Mapping[str, Any]
    growth: Mapping[str, Any] | None


@dataclasses.dataclass
class Records:
    """The records of all folders by kind, each under a unique name."""

    runs: dict[str, Lines] = dataclasses.field(default_factory=dict)
    grown: dict[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    trained: dict[str, Trained] = dataclasses.field(default_factory=dict)
    comparisons: dict[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def read_records(folders: Sequence[str]) -> Records:
    """Read the records of all folders.

    Raises:
        MissingInputError: a folder has none.
        DataError: a record is damaged, or a run has no metrics yet.
    """
    records = Records()
    for folder, name in unique_names(folders).items():
        path = Path(folder)
        if (path / "results.json").is_file():
            # Not read_json: a comparison may exceed the size that it allows.
            file = path / "results.json"
            records.comparisons[name] = parse_json(file.read_bytes(), str(file))
        elif (path / "measured").is_dir() and not (path / "run.json").is_file():
            raise MissingInputError(f"{folder}: a comparison without results: run tli-jax compare again to finish it")
        elif RunDirectory(folder).is_begun:
            records.runs[name] = read_run(folder)
        elif (path / TRAINING).is_file():
            growth = read_growth(path / "growth.json") if (path / "growth.json").is_file() else None
            records.trained[name] = Trained(read_training(path / TRAINING), growth)
        elif (path / "growth.json").is_file():
            records.grown[name] = read_growth(path / "growth.json")
        elif not path.is_dir():
            raise MissingInputError(f"{folder}: no such folder")
        else:
            raise MissingInputError(
                f"{folder}: nothing to report on: expected a run directory, a grown model (growth.json), a trained"
                " model (training.json) or a comparison (results.json)"
            )
    return records


def unique_names(folders: Sequence[str]) -> dict[str, str]:
    """The last component of each folder's path, with as many parents as make it unique."""

    def parts(folder: str) -> tuple[str, ...]:
        # Not resolved: two links are two names, and a loop of links must not fail here.
        return tuple((folder.rstrip("/") if "://" in folder else os.path.abspath(folder)).split("/"))  # noqa: PTH100

    distinct: dict[tuple[str, ...], str] = {}
    for folder in folders:
        distinct.setdefault(parts(folder), folder)
    names = {}
    for path, folder in distinct.items():
        others = [other for other in distinct if other != path]
        depth = next(n for n in range(1, len(path) + 2) if all(other[-n:] != path[-n:] for other in others))
        names[folder] = printable("/".join(path[-depth:]))
    return names
