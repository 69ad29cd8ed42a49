"""``losses.jsonl``: every loss that a scan has measured, so that an interrupted scan resumes.

The first line identifies the base, the tokens and the dtype. Each further line is ``[text, plan, loss]``. Only
process 0 reads and writes the file; all processes know what is in it.
"""

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tli_jax.distributed import processes
from tli_jax.errors import DataError, UsageError
from tli_jax.hf.files import replace_file, storage_errors
from tli_jax.hf.inputs import parse_json
from tli_jax.verify.scan import Scanner, Step

Steps = tuple[Step, ...]


class LossFile:
    """The losses in a file, and a ``Scanner`` per text to measure those that are missing.

    Args:
        identity: what the losses depend on.
        overwrite: start over if the file was written with another identity.

    Raises:
        UsageError: the file has another identity.
        DataError: the file is damaged.
    """

    def __init__(self, file: Path, identity: Mapping[str, Any], scanners: Mapping[str, Scanner], overwrite: bool):
        self.file, self.scanners = file, scanners
        self.known: dict[tuple[str, str], float] = {}
        content = file.read_bytes() if processes.is_first() and file.is_file() else b""
        lines = processes.share(content).decode(errors="replace").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # cut off when the process was killed
        if lines and (recorded := parse_json(lines[0].encode(), f"{file}: line 1")) != identity:
            changed = ", ".join(key for key in {**identity, **recorded} if recorded.get(key) != identity.get(key))
            if not overwrite:
                raise UsageError(f"{file}: of a scan with another {changed}: use another --output, or --overwrite")
            lines = []
        for number, line in enumerate(lines[1:], 2):
            try:
                name, plan, loss = json.loads(line)
                self.known[str(name), str(plan)] = float(loss)
            except (ValueError, TypeError):
                raise DataError(f"{file}: line {number} is damaged: delete the line") from None
        if processes.is_first():
            with storage_errors(file), replace_file(file) as temporary:
                temporary.write_text("".join(lines) or json.dumps(identity) + "\n", encoding="utf-8")

    def missing(self, text: str, plans: Sequence[Steps]) -> list[Steps]:
        """Those of ``plans`` that have not been measured, each once."""
        return [steps for steps in dict.fromkeys(plans) if (text, write_steps(steps)) not in self.known]

    def losses(self, text: str, plans: Sequence[Steps], advance: Callable[[int], object]) -> list[float]:
        """The losses of plans on a text. ``advance`` is called with 1 after each one that is measured."""
        missing = self.missing(text, plans)
        with storage_errors(self.file), self._open() as stream:

            def on_loss(index: int, loss: float) -> None:
                plan = write_steps(missing[index])
                if not math.isfinite(loss):
                    raise DataError(f"the loss of layers {plan[:200]} is {loss}: check the base, or scan in float32")
                self.known[text, plan] = loss
                if stream is not None:
                    stream.write(json.dumps([text, plan, loss]) + "\n")
                    stream.flush()
                advance(1)

            self.scanners[text].losses(missing, on_loss)
        return [self.known[text, write_steps(steps)] for steps in plans]

    def _open(self) -> contextlib.AbstractContextManager[IO[str] | None]:
        return self.file.open("a", encoding="utf-8") if processes.is_first() else contextlib.nullcontext()


def write_steps(steps: Steps) -> str:
    """Steps as text: ``0-4,5*0.5,5*0.5,6-11``. ``(5*0.5+6*0.5)*1.0`` is a
    weighted sum."""
    parts: list[str] = []
    run: list[int] = []

    def close() -> None:
        if run:
            parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
            run.clear()

    for (first, second), (weight, other), scale in steps:
        if (weight, other, scale) == (1, 0, 1):
            if run and first != run[-1] + 1:
                close()
            run.append(first)
            continue
        close()
        mean = f"{first}" if (weight, other) == (1, 0) else f"({first}*{weight!r}+{second}*{other!r})"
        parts.append(f"{mean}*{scale!r}")
    close()
    return ",".join(parts)
