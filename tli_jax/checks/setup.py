"""Checks of the processes and of the mesh."""

from importlib import metadata

from tli_jax.checks.context import Context, NotCheckedError, Result, join, require
from tli_jax.cli.libtpu import has_compiler
from tli_jax.distributed import processes
from tli_jax.errors import UsageError
from tli_jax.growth.plan import Plan
from tli_jax.hf import sidecar
from tli_jax.hf.grown_config import grown_config

_PACKAGES = ("tli_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")


def check_processes(context: Context) -> Result:
    """All processes must have the same versions and the same devices."""
    config = context.config
    versions = sidecar.versions(*_PACKAGES)
    if has_compiler():
        versions["libtpu"] = metadata.version("libtpu")
    if config.topology and not (config.train and (config.train.distributed or config.train.process)):
        return f"only this one, {join(versions)}", {"versions": versions}
    import jax

    local = {"versions": versions, "devices": [device.device_kind for device in jax.local_devices()]}
    everyone = processes.gather_json(local)
    for index, other in enumerate(everyone):
        if other["versions"] != versions:
            pairs = {name: (version, other["versions"].get(name)) for name, version in versions.items()}
            differences = ", ".join(f"{name} {a} and {b}" for name, (a, b) in pairs.items() if a != b)
            raise UsageError(
                f"processes: process {index} has other versions: {differences}: install the same versions everywhere"
            )
    kinds = {kind for other in everyone for kind in other["devices"]}
    counts = sorted({len(other["devices"]) for other in everyone})
    if len(kinds) > 1 or len(counts) > 1:
        raise UsageError(f"processes: devices differ: {', '.join(sorted(kinds))}, {counts} per process")
    text = f"{len(everyone)} with {counts[0]} × {min(kinds)} each, {join(versions)}"
    return text, {"versions": versions, "processes": len(everyone), "devices": counts[0], "kind": min(kinds)}


def check_mesh(context: Context) -> Result:
    from tli_jax.distributed.mesh import batch_degree
    from tli_jax.training.trainer import make_trainer

    base = require(context.base, "a model")
    model, plan = base.config, context.plan
    if plan is not None:
        model = grown_config(model, plan)
    elif context.grows or context.train.grow is not None:
        raise NotCheckedError("needs a plan")
    elif base.growth is not None:
        plan = Plan.from_json(base.growth)
    context.trainer, context.T, notes = make_trainer(context.train, model, plan, context.devices())
    config, mesh = context.trainer.config, context.trainer.mesh
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    rows = config.batch_size // config.grad_accum_steps // batch_degree(mesh)
    text = f"{sizes} of {mesh.size} × {mesh.devices.flat[0].device_kind}, microbatches of {rows} × {context.T:,} tokens"
    text += f" per device, {config.grad_accum_steps} per step; {'; '.join(notes)}"
    return text, {"mesh": dict(mesh.shape), "sequence_length": context.T, "sequences_a_device": rows}
