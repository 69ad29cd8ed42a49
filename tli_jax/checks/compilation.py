"""Checks that compile the growth and the train step, and compare their memory with that of the device."""

import dataclasses
import os
from typing import Any

from tli_jax.checks.context import Context, DoesNotFitError, NotCheckedError, Result, join, require
from tli_jax.cli.console import console
from tli_jax.distributed import topology
from tli_jax.errors import UsageError
from tli_jax.growth.rows import HOST_INITS

_ON_PAPER = "programs for a GPU compile on a GPU only"


def check_growth(context: Context) -> Result:
    from tli_jax.distributed.mesh import make_mesh
    from tli_jax.training.memory import compile_growth

    base, plan = require(context.base, "a model"), require(context.plan, "a plan")
    on_host = sorted({row.init for row in plan.rows if row.init in HOST_INITS})
    if on_host:
        raise NotCheckedError(f"init {', '.join(on_host)} runs on the host, from file to file")
    if context.is_on_paper:
        raise NotCheckedError(_ON_PAPER)
    mesh = context.trainer.mesh if context.trainer is not None else make_mesh({}, context.devices())
    return _judge(context, compile_growth(base.config, plan, mesh), mesh, "try a larger slice")


def check_step(context: Context) -> Result:
    from tli_jax.training import memory
    from tli_jax.training.fit import fit

    trainer, screen = require(context.trainer, "a mesh"), console(is_stderr=True)
    limit = _memory_limit(context, trainer.mesh)
    if context.is_on_paper:
        return _estimate_step(context, limit)
    trainer, program = fit(
        trainer, context.T, context.stored_dtype, limit, lambda line: screen.print(line, soft_wrap=True)
    )
    estimate = memory.estimate(trainer, context.T, context.stored_dtype)
    more = {"on_paper": estimate, "remat": trainer.config.remat}
    text, facts = _judge(context, program, trainer.mesh, memory.hints(trainer, context.T), more)
    text = f"remat {trainer.config.remat}, {text}"
    return f"{text}; estimated {memory.gib(estimate['peak'])}: {_terms(estimate)}", facts


def _estimate_step(context: Context, limit: float) -> Result:
    """Judge the step by the formula in docs/scaling.md, for devices that nothing can be compiled for."""
    from tli_jax.training import memory

    trainer = require(context.trainer, "a mesh")
    remat = trainer.config.remat
    estimates = {}
    for policy in memory.POLICIES if remat == "auto" else (remat,):
        config = dataclasses.replace(trainer.config, remat=policy)
        estimates[policy] = memory.estimate(
            dataclasses.replace(trainer, config=config), context.T, context.stored_dtype
        )
    fitting = [policy for policy, parts in estimates.items() if parts["peak"] <= limit]
    remat = next(iter(fitting), [*estimates][-1])
    estimate = estimates[remat]
    facts = {"on_paper": estimate, "remat": remat, "limit": limit, "fits": bool(fitting)}
    if not facts["fits"]:
        hints = memory.hints(trainer, context.T)
        message = f"does not fit, on paper: needs {memory.gib(estimate['peak'])} of {memory.gib(limit)}; {hints}"
        raise DoesNotFitError(message, facts)
    text = f"remat {remat}, estimated peak {memory.gib(estimate['peak'])} of {memory.gib(limit)} per"
    return f"{text} device: {_terms(estimate)}; not compiled, because {_ON_PAPER}", facts


def _terms(estimate: dict[str, float]) -> str:
    from tli_jax.training.memory import gib

    return join({name: gib(nbytes) for name, nbytes in estimate.items() if name != "peak"})


def search(context: Context) -> Result:
    """The largest batch per device for each remat policy."""
    from tli_jax.distributed.mesh import batch_degree
    from tli_jax.training import memory

    if context.is_on_paper:
        raise NotCheckedError(_ON_PAPER)
    trainer, screen = require(context.trainer, "a mesh"), console(is_stderr=True)
    limit = _memory_limit(context, trainer.mesh)
    best = memory.search(
        trainer, context.T, context.stored_dtype, limit, lambda line: screen.print(line, soft_wrap=True)
    )
    if not best:
        raise UsageError(f"does not fit with any remat: {memory.hints(trainer, context.T)}")
    remat, size = next(iter(best.items()))
    steps = trainer.config.batch_size // (batch_degree(trainer.mesh) * size)
    flags = f"--train.remat {remat} --train.grad-accum-steps {steps}"
    return f"largest microbatch per device, by remat: {join(best)}; the fastest: {flags}", {
        "largest": best,
        "flags": flags,
    }


def _judge(context: Context, program: Any, mesh: Any, hints: str, more: dict[str, Any] | None = None) -> Result:
    from tli_jax.training.memory import gib

    limit = _memory_limit(context, mesh)
    facts = dataclasses.asdict(program) | {"limit": limit} | (more or {})
    if not program.fits or program.peak > limit:
        message = f"does not fit: needs {gib(program.peak)} of {gib(limit)}; {hints}"
        raise DoesNotFitError(message, facts | {"fits": False})
    text = f"peak {gib(program.peak)} of {gib(limit)} per device (arguments {gib(program.arguments)}, temporaries"
    text += f" {gib(program.temporaries)}), {join(program.collectives) or 'no collectives'}"
    return f"{text}, compiled in {program.seconds:.0f} s", facts


def _memory_limit(context: Context, mesh: Any) -> float:
    """Bytes that a program may use on one device."""
    if context.config.topology:
        return topology.parse_topology(context.config.topology).hbm
    device = mesh.devices.flat[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(device.client.local_devices())
