"""``python -m tli_jax.preflight``: will this run fit, and start, over there? Writes nothing and starts nothing."""

import os
import sys
from collections.abc import Sequence

from tli_jax.checks.preflight import Preflight
from tli_jax.cli.config import PreflightConfig, TrainConfig
from tli_jax.cli.console import print_json
from tli_jax.cli.frame import run_command
from tli_jax.cli.parse import parse
from tli_jax.distributed import processes
from tli_jax.errors import UsageError

PROGRAM = "python -m tli_jax.preflight"


def main(arguments: Sequence[str]) -> None:
    config = parse(PreflightConfig, PROGRAM, "Check whether a run fits and starts, without starting it.", arguments)
    train = config.train or TrainConfig()
    if config.topology and not (train.distributed or train.process):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or JAX would look for the TPU, now that its compiler is here
    with processes.joined(train.distributed, train.process):
        findings = Preflight(config).run()
    if config.json and processes.is_first():
        checks = [{"name": f.name, "status": f.status, "text": f.text} | f.facts for f in findings]
        print_json({"checks": checks})
    if failed := [finding.error for finding in findings if finding.error is not None]:
        raise failed[0]
    if config.strict and (missing := [finding.name for finding in findings if finding.status == "not checked"]):
        raise UsageError(f"strict: not checked: {', '.join(missing)}: bring what is missing, or leave --strict out")


if __name__ == "__main__":
    processes.leave(run_command(main, sys.argv[1:]))
