"""Whether a run fits in device memory: by compiling its programs ahead of time, with or without the devices, and by
estimate."""

import collections
import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.distributed.mesh import batch_degree, param_sharding
from tli_jax.growth.inject import inject
from tli_jax.growth.plan import Plan
from tli_jax.growth.upcycle import upcycle
from tli_jax.hf.grown_config import grown_config
from tli_jax.models.config import LlamaConfig
from tli_jax.models.cross_entropy import LOGITS, ROWS
from tli_jax.models.llama import Remat
from tli_jax.models.tree import nest
from tli_jax.training.freezing import ParamSpec
from tli_jax.training.step import Programs

# Rematerialization policies, fastest first.
POLICIES: tuple[Remat, ...] = ("none", "dots", "attention", "full")

_COLLECTIVES = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_SIZE = re.compile(r"([\d.]+)([KMG])\b")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
    """Memory of one compiled program, in bytes per device.

    Attributes:
        fits: whether it compiled, which for a TPU means that it fits.
        peak: most memory in use at a time; a lower bound if it does not fit.
        arguments: inputs of the program; most of them are donated and updated in place.
        temporaries: scratch memory; not all of it is in use at the peak.
        collectives: number of collective operations by kind, those in loops counted once.
        seconds: compilation time.
        error: the compiler's message if it does not fit.
    """

    fits: bool
    peak: float
    arguments: float
    temporaries: float
    collectives: dict[str, int]
    seconds: float
    error: str = ""


def compile_step(programs: Programs, T: int, dtypes: Callable[[ParamSpec], Any]) -> CompiledMemory:
    """Compile the train step of a run.

    Args:
        T: tokens per sequence.
        dtypes: stored dtype of each frozen array.
    """
    state = programs.abstract_state()
    frozen = {name: x for name, x in programs.abstract_params(dtypes).items() if name not in state.trained}
    microbatches = programs.config.grad_accum_steps
    shape = (microbatches, programs.config.batch_size // microbatches, T + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=programs.batch_sharding)
    per_device = jax.sharding.NamedSharding(programs.mesh, jax.sharding.PartitionSpec(programs.mesh.axis_names))
    stop = jax.ShapeDtypeStruct((programs.mesh.size,), jnp.int32, sharding=per_device)
    return _compile(programs.step, state, frozen, tokens, tokens, stop)


def compile_growth(base: LlamaConfig, plan: Plan, mesh: jax.sharding.Mesh) -> CompiledMemory:
    """Compile ``inject``, and ``upcycle`` if the plan adds experts, for params sharded over the mesh in their stored
    dtype. Base and grown model exist at the same time."""

    def abstract(config: LlamaConfig) -> Any:
        tensors = {f"layers.{name}": ("L", *dims) for name, dims in config.layer_tensors.items()} | config.outer_tensors
        sizes = config.sizes | {"L": config.num_hidden_layers}
        shapes = {name: tuple(sizes[dim] for dim in dims) for name, dims in tensors.items()}
        return nest(
            {
                name: jax.ShapeDtypeStruct(shapes[name], config.dtype, sharding=param_sharding(mesh, dims))
                for name, dims in tensors.items()
            }
        )

    def grow(params: Any) -> Any:
        grown = inject(params, plan)
        return grown if plan.experts is None else upcycle(grown, plan.experts)

    shardings = jax.tree.map(lambda x: x.sharding, abstract(grown_config(base, plan)))
    return _compile(jax.jit(grow, out_shardings=shardings), abstract(base))


def _compile(program: Any, *inputs: Any) -> CompiledMemory:
    arguments = sum(_device_bytes(x) for x in jax.tree.leaves(inputs))
    started = time.perf_counter()
    try:
        compiled = program.lower(*inputs).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message = " ".join(str(error).split())[:300]
        # The first size in the message is what was requested: for temporaries alone, or for everything.
        size = _SIZE.search(message)
        requested = float(size[1]) * _UNITS[size[2]] if size else 0.0
        temporary = requested if "temporaries" in message else max(requested - arguments, 0.0)
        seconds = time.perf_counter() - started
        return CompiledMemory(False, arguments + temporary, arguments, temporary, {}, seconds, message)
    memory = compiled.memory_analysis()
    peak, platform = memory.peak_memory_in_bytes, jax.tree.leaves(inputs)[0].sharding.mesh.devices.flat[0].platform
    if platform != "tpu":  # other compilers do not report when temporaries are freed
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    collectives = dict(sorted(collections.Counter(_COLLECTIVES.findall(compiled.as_text())).items()))
    seconds = time.perf_counter() - started
    return CompiledMemory(True, peak, memory.argument_size_in_bytes, memory.temp_size_in_bytes, collectives, seconds)


def _device_bytes(array: Any) -> int:
    """Size of one device's shard."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def total_bytes(array: Any) -> int:
    """Size of a complete array, sharded or not."""
    return array.size * array.dtype.itemsize


def estimate(programs: Programs, T: int, dtypes: Callable[[ParamSpec], Any]) -> dict[str, float]:
    """Bytes per device by the formula in docs/scaling.md.

    Args:
        T: tokens per sequence.
        dtypes: stored dtype of each frozen array.

    Returns:
        ``parameters``, ``moments``, ``gradients``; ``activations`` kept for the backward pass; working memory of one
        ``layer`` and of the ``head``; and the ``peak``. The head's memory is free before layers have gradients.
    """
    config, model, mesh = programs.config, programs.model, programs.mesh
    state = programs.abstract_state()
    params = programs.abstract_params(dtypes)
    compute = np.dtype(config.compute_dtype).itemsize
    tensor, experts = mesh.shape["tensor"], max(model.experts_per_token, 1)
    B = config.batch_size // config.grad_accum_steps // batch_degree(mesh)
    D, sizes = model.hidden_size, model.sizes
    attention, mlp = (sizes["Hh"] + 2 * sizes["Kh"]) / tensor, sizes["F"] * experts / tensor
    # Numbers per token and layer: all of them, and those that each remat policy keeps.
    inside = 4 * D + 2 * attention + 3 * mlp
    around = D + attention + sizes["Hh"] / tensor
    kept = {"offload": 0, "full": D, "attention": around, "dots": around + D + 2 * mlp}.get(config.remat, inside)
    trained = sum(map(_device_bytes, state.trained.values()))
    V = sizes["V"] / tensor
    chunk = min(B * T, max(ROWS, LOGITS // V))
    parts: dict[str, float] = {
        "parameters": trained + sum(_device_bytes(params[s.name]) for s in programs.param_specs if not s.trains),
        "moments": sum(map(_device_bytes, jax.tree.leaves(state.optimizer_state))),
        # Gradient accumulation holds the sum beside the gradients of the current microbatch.
        "gradients": trained * (2 if config.grad_accum_steps > 1 else 1),
        "activations": (model.num_hidden_layers - programs.layout.lowest) * B * T * kept * compute,
        # All-gathered weights of the current layer and the next, and rematerialized activations.
        "layer": 2 * model.layer_params / (tensor * mesh.shape["expert"]) * compute + 2 * B * T * inside * compute,
        # The all-gathered head, with its fp32 gradient if it is trained; logits of one chunk and their gradient.
        "head": V * D * (compute + 4 * programs.is_head_trained) + chunk * V * (4 + compute),
    }
    throughout = parts["parameters"] + parts["moments"] + parts["activations"]
    summed = trained if config.grad_accum_steps > 1 else 0
    return parts | {"peak": throughout + max(parts["head"] + summed, parts["gradients"] + parts["layer"])}


def search(
    programs: Programs, T: int, dtypes: Callable[[ParamSpec], Any], limit: float, report: Callable[[str], None]
) -> dict[str, int]:
    """Find the largest microbatch per device that fits, for each remat policy, cheapest first.

    Args:
        limit: memory of a device in bytes.
        report: called with one line for each attempt, which may take minutes.

    Returns:
        Remat policy to sequences per device; policies that never fit are absent.
    """
    per_device = programs.config.batch_size // batch_degree(programs.mesh)
    sizes = [size for size in range(1, per_device + 1) if per_device % size == 0]
    best: dict[str, int] = {}
    first = 0
    for remat in POLICIES:  # each needs less memory than the policy before it
        for i in range(first, len(sizes)):
            config = dataclasses.replace(programs.config, remat=remat, grad_accum_steps=per_device // sizes[i])
            memory = compile_step(dataclasses.replace(programs, config=config), T, dtypes)
            fits = memory.fits and memory.peak <= limit
            use = f"{gib(memory.peak)} of {gib(limit)}"
            report(
                f"remat {remat}, {sizes[i]} sequences per device: {'fits' if fits else 'does not fit'}, {use},"
                f" {memory.seconds:.0f} s"
            )
            if not fits:
                break
            best[remat], first = sizes[i], i
    return best


def hints(programs: Programs, T: int) -> str:
    """Options that would reduce the memory of a run."""
    config = programs.config
    rows = config.batch_size // config.grad_accum_steps // batch_degree(programs.mesh)
    flags = ["--train.remat full"] * (config.remat not in ("auto", "full", "offload"))
    flags += ["--train.grad-accum-steps 0"] * (rows > 1)
    flags += [f"--train.batch-size {config.batch_size // config.grad_accum_steps}"] * (config.grad_accum_steps > 1)
    flags += ["--train.only injected"] * (config.only == "all" and any(programs.layout.injected))
    flags += [f"--train.sequence-length {T // 2}"] * (T > 1024)
    return f"try {', or '.join([*flags, 'a larger slice'])}"


def gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MiB"
