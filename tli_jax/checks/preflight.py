"""Check whether a run fits and starts, possibly on another machine. Nothing is written and nothing is started.

Each check does what ``upscale`` and ``train`` would do, as far as this machine can: the configuration, the headers of
the model, the plan, disk space, data and processes. The growth and the train step are compiled, for the devices of this
machine or for a TPU slice.
"""

from collections.abc import Callable

from tli_jax.checks import compilation, files, setup
from tli_jax.checks.context import Context, DoesNotFitError, Finding, NotCheckedError, Result
from tli_jax.cli.console import console
from tli_jax.cli.growth_config import PreflightConfig
from tli_jax.distributed import processes
from tli_jax.errors import TliError

Check = Callable[[Context], Result]


def run_checks(config: PreflightConfig) -> list[Finding]:
    """Run all checks, and print each when it is done."""
    context = Context(config)
    screen = console(is_stderr=config.json)
    findings = []
    for name, check in select_checks(context).items():
        compiles = check in (compilation.check_growth, compilation.check_step) and not context.is_on_paper
        if compiles and processes.is_first():
            console(is_stderr=True).print(f"{name}: compiling …", soft_wrap=True)
        finding = run_check(name, check, context)
        findings.append(finding)
        if processes.is_first():
            screen.print(f"{name:<15} {finding.status:<11} {finding.text}", soft_wrap=True)
    return findings


def select_checks(context: Context) -> dict[str, Check]:
    """The checks of a configuration, in the order in which they build on each other."""
    config = context.config
    checks: dict[str, Check] = {"model": files.check_model}
    if context.grows:
        checks["growth"] = files.check_growth
    elif context.train.grow is not None:
        checks["growth"] = files.check_growth_while_loading
    checks["processes"] = setup.check_processes
    if config.train is not None:
        checks |= {"mesh": setup.check_mesh, "run": files.check_run_directory, "data": files.check_data}
    checks["disk"] = files.check_disk
    if context.grows:
        checks["growth compiles"] = compilation.check_growth
    if config.train is not None:
        checks["step compiles"] = compilation.search if config.search else compilation.check_step
    return checks


def run_check(name: str, check: Check, context: Context) -> Finding:
    try:
        text, facts = check(context)
    except NotCheckedError as reason:
        return Finding(name, "not checked", str(reason))
    except TliError as error:
        facts = error.facts if isinstance(error, DoesNotFitError) else {}
        return Finding(name, "fails", str(error), facts, error)
    return Finding(name, "ok", text, facts)
