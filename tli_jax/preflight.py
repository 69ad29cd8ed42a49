"""``tli-jax preflight``: check whether a run fits and starts, possibly on another machine."""

import os
import sys
from collections.abc import Sequence

from tli_jax.checks.preflight import run_checks
from tli_jax.cli.console import print_json
from tli_jax.cli.frame import run_command
from tli_jax.cli.growth_config import PreflightConfig
from tli_jax.cli.parse import parse
from tli_jax.cli.train_config import TrainConfig
from tli_jax.distributed import processes
from tli_jax.errors import UsageError

PROGRAM = "tli-jax preflight"
DESCRIPTION = "Check whether a growth and its training fit and start. Nothing is written or started."
EXAMPLES = (
    "--config configs/llama3.1-8b-tli.yaml",
    "--config configs/llama3.1-8b-tli.yaml --topology v5e-8 --search",
)


def main(arguments: Sequence[str]) -> None:
    config = parse(PreflightConfig, PROGRAM, DESCRIPTION, arguments, EXAMPLES)
    train = config.train or TrainConfig()
    if config.topology and not (train.distributed or train.process):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # with libtpu installed, JAX would look for a TPU
    with processes.joined(train.distributed, train.process, train.timeouts):
        findings = run_checks(config)
    if config.json and processes.is_first():
        checks = [{"name": found.name, "status": found.status, "text": found.text} | found.facts for found in findings]
        print_json({"checks": checks})
    if errors := [finding.error for finding in findings if finding.error is not None]:
        raise errors[0]
    if config.strict and (missing := [finding.name for finding in findings if finding.status == "not checked"]):
        raise UsageError(f"strict: not checked: {', '.join(missing)}: provide what is missing, or omit --strict")


if __name__ == "__main__":
    processes.leave(run_command(main, sys.argv[1:]))
