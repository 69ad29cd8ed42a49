"""Whether a run fits: its programs compiled ahead of time, for devices that need not be there; and on paper."""

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
from tli_jax.models.llama import Remat
from tli_jax.models.loss import LOGITS
from tli_jax.models.tree import nest
from tli_jax.training.step import Trainer

_COLLECTIVES = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_SIZE = re.compile(r"([\d.]+)([KMG])\b")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Fit:
    """What the compiler says of one program, in bytes a device.

    Attributes:
        fits: whether it compiled, which for a TPU means that it fits.
        peak: most memory in use at a time. Where it does not fit, what is known to be needed at least.
        arguments: what the program is given; most of it it gives back changed, in the same place.
        temporaries: what it needs besides; more than its share of the peak, as not all of it is needed at once.
        collectives: how many of each kind are in the program; those in a loop run once a turn.
        seconds: that compiling took.
        problem: of what does not fit, in the compiler's words.
    """

    fits: bool
    peak: float
    arguments: float
    temporaries: float
    collectives: dict[str, int]
    seconds: float
    problem: str = ""


def compile_step(trainer: Trainer, T: int, dtypes: Callable[[Any], Any]) -> Fit:
    """The train step of a run at sequences of T tokens.

    Args:
        dtypes: of each frozen leaf, as it is stored.
    """
    state = trainer.abstract_state()
    params = trainer.abstract_params(dtypes)
    frozen = {name: leaf for name, leaf in params.items() if name not in state.trained}
    parts = trainer.config.grad_accum_steps
    shape = (parts, trainer.config.batch_size // parts, T + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=trainer.batch_sharding)
    everyone = jax.sharding.NamedSharding(trainer.mesh, jax.sharding.PartitionSpec(trainer.mesh.axis_names))
    stop = jax.ShapeDtypeStruct((trainer.mesh.size,), jnp.int32, sharding=everyone)
    return _compile(trainer.step, state, frozen, tokens, tokens, stop)


def compile_growth(base: LlamaConfig, plan: Plan, mesh: jax.sharding.Mesh) -> Fit:
    """``inject``, and ``upcycle`` where the plan has experts, over params that lie on the mesh, in their stored dtype:
    base and grown model are there at once."""

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

    places = jax.tree.map(lambda leaf: leaf.sharding, abstract(grown_config(base, plan)))
    return _compile(jax.jit(grow, out_shardings=places), abstract(base))


def _compile(program: Any, *arguments: Any) -> Fit:
    nbytes = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(arguments))
    started = time.perf_counter()
    try:
        compiled = program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        problem = " ".join(str(error).split())[:300]
        # The first size that it names is what it wanted: of temporaries alone, or of all.
        found = _SIZE.search(problem)
        wanted = float(found[1]) * _UNITS[found[2]] if found else 0.0
        temporaries = wanted if "temporaries" in problem else max(wanted - nbytes, 0.0)
        seconds = time.perf_counter() - started
        return Fit(False, nbytes + temporaries, nbytes, temporaries, {}, seconds, problem)
    memory = compiled.memory_analysis()
    peak, platform = memory.peak_memory_in_bytes, jax.tree.leaves(arguments)[0].sharding.mesh.devices.flat[0].platform
    if platform != "tpu":  # elsewhere the compiler does not say when temporaries are done with
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = collections.Counter(_COLLECTIVES.findall(compiled.as_text()))
    return Fit(
        fits=True,
        peak=peak,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        collectives=dict(sorted(found.items())),
        seconds=time.perf_counter() - started,
    )


def _local_bytes(leaf: Any) -> int:
    """Of one device's share."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def whole_bytes(leaf: Any) -> int:
    """Of an array, wherever its parts lie."""
    return leaf.size * leaf.dtype.itemsize


def on_paper(trainer: Trainer, T: int, dtypes: Callable[[Any], Any]) -> dict[str, float]:
    """Bytes a device by formula, see docs/scaling.md: ``parameters``, ``moments``, ``gradients``, ``activations``
    that wait for the backward pass, what one ``layer`` and what the ``head`` work with; and the ``peak``, as the head
    is done with before there are gradients of layers.

    Args:
        dtypes: of each frozen leaf, as it is stored.
    """
    config, model, mesh = trainer.config, trainer.model, trainer.mesh
    state = trainer.abstract_state()
    frozen = [leaf for leaf in trainer.param_specs if not leaf.trains]
    held = trainer.abstract_params(dtypes)
    compute = np.dtype(config.compute_dtype).itemsize
    tensor, chosen = mesh.shape["tensor"], max(model.experts_per_token, 1)
    B = config.batch_size // config.grad_accum_steps // batch_degree(mesh)
    sizes = model.sizes
    heads, wide = (sizes["Hh"] + 2 * sizes["Kh"]) / tensor, sizes["F"] * chosen / tensor
    inside = 4 * model.hidden_size + 2 * heads + 3 * wide
    kept = {"full": model.hidden_size, "dots": 3 * model.hidden_size + heads + 2 * wide, "none": inside}[config.remat]
    trained = sum(map(_local_bytes, state.trained.values()))
    outside = sizes["V"] * sizes["D"] / tensor * compute
    parts: dict[str, float] = {
        "parameters": trained + sum(_local_bytes(held[leaf.name]) for leaf in frozen),
        "moments": sum(map(_local_bytes, jax.tree.leaves(state.optimizer_state))),
        # Of parts of a batch the sum is held beside the newest.
        "gradients": trained * (2 if config.grad_accum_steps > 1 else 1),
        "activations": (model.num_hidden_layers - trainer.lowest) * B * T * kept * compute,
        # Weights of the layer that runs and of the next one, brought together over fsdp; and what is computed again.
        "layer": 2 * model.layer_params / (tensor * mesh.shape["expert"]) * compute + 2 * B * T * inside * compute,
        # Brought together too, with its gradient where it has one; logits and their gradient, of one chunk.
        "head": (1 + trainer.is_head_trained) * outside + 2 * LOGITS * 4,
    }
    # Where parts of a batch are summed, the gradients of head and embedding wait whole for the end of each part.
    waiting = 2 * outside * (trainer.is_head_trained and config.grad_accum_steps > 1)
    held_throughout = parts["parameters"] + parts["moments"] + parts["activations"]
    return parts | {"peak": held_throughout + max(parts["head"], parts["gradients"] + parts["layer"] + waiting)}


def search(
    trainer: Trainer, T: int, dtypes: Callable[[Any], Any], limit: float, report: Callable[[str], None]
) -> dict[str, int]:
    """Remat policy, cheapest first -> the most sequences a device at a time that fit; policies that never fit are out.

    Args:
        limit: bytes that a device has.
        report: told of each try, which may take minutes.
    """
    whole = trainer.config.batch_size // batch_degree(trainer.mesh)
    sizes = [size for size in range(1, whole + 1) if whole % size == 0]
    best: dict[str, int] = {}
    least = 0
    policies: tuple[Remat, ...] = ("none", "dots", "full")
    for remat in policies:  # each fits all that the one before it does
        for at in range(least, len(sizes)):
            config = dataclasses.replace(trainer.config, remat=remat, grad_accum_steps=whole // sizes[at])
            found = compile_step(dataclasses.replace(trainer, config=config), T, dtypes)
            fits = found.fits and found.peak <= limit
            what = f"{'fits' if fits else 'does not fit'}, {gib(found.peak)} of {gib(limit)}, {found.seconds:.0f} s"
            report(f"remat {remat}, {sizes[at]} sequences a device at a time: {what}")
            if not fits:
                break
            best[remat], least = sizes[at], at
    return best


def hints(trainer: Trainer, T: int) -> str:
    """What a run that does not fit could do with less."""
    config, mesh = trainer.config, trainer.mesh
    rows = config.batch_size // config.grad_accum_steps // batch_degree(mesh)
    found = ["--train.remat full"] * (config.remat != "full")
    found += ["--train.grad-accum-steps 0"] * (rows > 1)
    found += [f"--train.batch-size {config.batch_size // config.grad_accum_steps}"] * (config.grad_accum_steps > 1)
    found += ["--train.only injected"] * (config.only == "all" and any(trainer.layout.injected))
    found += [f"--train.sequence-length {T // 2}"] * (T > 1024)
    return f"try {', or '.join([*found, 'a larger slice'])}"


def gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MiB"
