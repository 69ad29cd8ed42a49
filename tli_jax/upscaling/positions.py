"""Where to inject: evenly, away from both ends, or where a scan measured the smallest cost."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tli_jax.cli.growth_options import GrowthOptions
from tli_jax.errors import DataError, MissingInputError, UsageError
from tli_jax.growth.doubling import DOUBLINGS, duplicated, harmful_by_cost, harmful_by_rule, inner_positions
from tli_jax.growth.plan import Plan
from tli_jax.growth.plan_json import read_list
from tli_jax.growth.rows import HOST_INITS
from tli_jax.hf.inputs import read_json


def choose_positions(
    config: GrowthOptions, method: Callable[..., Plan], layers: int, given: Mapping[str, Any]
) -> tuple[int, ...]:
    """As many positions as the method has by default, chosen as ``config.positions`` says.

    Args:
        given: the options of the method.

    Raises:
        UsageError: there are not enough layers, or no scan.
        MissingInputError, DataError: the scan cannot be read.
    """
    default = method(layers, **given)
    count = sum(default.injected) // given.get("copies", 1)
    if config.positions == "inner":
        return inner_positions(layers, count)
    if config.scan is None:
        raise UsageError("positions measured needs a scan: --scan DIR/scan.json, made by tli-jax scan")
    init = next(row.init for row in default.rows if row.injected)
    costs = dict(enumerate(_costs(config.scan, layers, init)))
    if init in HOST_INITS:
        del costs[layers - 1]  # these need a layer on both sides
    return tuple(sorted(sorted(costs, key=costs.__getitem__)[:count]))


def find_harm(config: GrowthOptions, plan: Plan) -> str | None:
    """A warning if the plan runs layers twice that should not: by the scan, or without one by a rule."""
    twice = duplicated(plan)
    init = next((row.init for row in plan.rows if row.injected and row.scale != 0), "half")
    costs = None if config.scan is None else _costs(config.scan, plan.base_layers, init)
    if plan.guarantee != "none" or not twice or (config.plan is not None and costs is None):
        return None
    if costs is None:
        harmful = sorted({*twice} & {*harmful_by_rule(plan.base_layers)})
        reason = "on trained bases the first two layers and the last are the worst to duplicate"
        advice = "use --positions inner, or measure your base with tli-jax scan"
    else:
        harmful = sorted({*twice} & {*harmful_by_cost(costs)})
        reason = f"alone they cost {', '.join(f'{costs[layer]:+.3f}' for layer in harmful)} nats by {config.scan}"
        advice = "use --positions measured, or other layers"
    if not harmful:
        return None
    return f"the growth duplicates layer{'s' * (len(harmful) > 1)} {', '.join(map(str, harmful))}: {reason}: {advice}"


def _costs(path: str, layers: int, init: str) -> list[float]:
    """How far doubling each layer moves the loss, as a mean over the texts of a scan: with ``init`` if it was measured,
    or else with the first of half, copy, … that was."""
    file = Path(path)
    if not file.is_file():
        raise MissingInputError(f"scan {path}: no such file: give the scan.json of tli-jax scan")
    record = read_json(file)
    try:
        if record["base"]["layers"] != layers:
            raise UsageError(f"scan {path}: of a base of {record['base']['layers']} layers, this one has {layers}")
        texts = list(record["costs"].values())
        kind = next(kind for kind in (init, "half", *DOUBLINGS) if kind in DOUBLINGS and kind in texts[0])
        columns = [read_list((int, float), text, kind) for text in texts]
        return [sum(map(abs, column)) / len(texts) for column in zip(*columns, strict=True)]
    except StopIteration:
        raise UsageError(f"scan {path}: no layer was doubled: scan with --what {','.join(DOUBLINGS)}") from None
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise DataError(
            f"{path}: not a scan.json ({type(error).__name__}: {error}): make it with tli-jax scan"
        ) from error


def read_plan(path: str, layers: int) -> Plan:
    """Read the plan file of a scan.

    Raises:
        MissingInputError, DataError: it does not exist, or is not a plan.
        UsageError: it is for a base of another depth.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingInputError(f"plan {path}: no such file: give the plan.json of tli-jax scan")
    plan = Plan.from_json(read_json(file), path)
    if plan.base_layers != layers:
        raise UsageError(f"plan {path}: for a base of {plan.base_layers} layers, this one has {layers}")
    return plan
