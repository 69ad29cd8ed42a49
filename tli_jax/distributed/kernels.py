"""Choose the attention implementation and the expert dispatch of a run, by platform, mesh and sizes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tli_jax.distributed.mesh import BATCH
from tli_jax.errors import UsageError
from tli_jax.models.attention import AttentionFn, AttentionImpl, causal, query_block
from tli_jax.models.moe import ExpertDispatch, Routing, chosen_experts, every_expert

_QKV = PartitionSpec(BATCH, None, "tensor", None)
_PLATFORM = {"cudnn": "gpu", "splash": "tpu"}
_SPLASH_BLOCK = 128  # lanes of a TPU


def choose_attention(
    name: str, mesh: Mesh, T: int, head_dim: int, dtype: str, isolate: bool = True
) -> tuple[AttentionImpl, str]:
    """Return an attention implementation and its description for the log.

    Args:
        name: ``xla``, ``cudnn``, ``splash``, or ``auto`` for the fastest that runs here.
        T: tokens per sequence.
        dtype: the compute dtype.
        isolate: mask attention across document boundaries.

    Raises:
        UsageError: the implementation does not support this platform, size or dtype.
    """
    platform = mesh.devices.flat[0].platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    unmet = {"cudnn": "", "splash": ""}  # what each kernel needs and does not have
    if dtype != "bfloat16" or head_dim % 8 or head_dim > 128:
        unmet["cudnn"] = "bfloat16 and a head size that is a multiple of 8, at most 128"
    if dtype != "bfloat16" or T % _SPLASH_BLOCK:
        unmet["splash"] = f"bfloat16 and a sequence_length that is a multiple of {_SPLASH_BLOCK}"
    if name == "auto":
        name = next((impl for impl, runs_on in _PLATFORM.items() if runs_on == platform and not unmet[impl]), "xla")
    elif name in _PLATFORM and _PLATFORM[name] != platform:
        raise UsageError(f"attention: {name} runs on {_PLATFORM[name]}, this is {platform}: choose xla or auto")
    elif unmet.get(name):
        raise UsageError(f"attention: {name} needs {unmet[name]}: choose xla or auto")
    return _attention(name, mesh, isolate), f"{name}, {'within' if isolate else 'across'} documents"


@functools.cache  # equal functions are one object, so that programs that use them are known to be equal
def _attention(name: str, mesh: Mesh, isolate: bool) -> AttentionImpl:
    kernels = {"xla": _xla, "cudnn": _cudnn, "splash": _splash}
    impl: AttentionImpl = functools.partial(kernels[name], mesh)
    return impl if isolate else lambda T, segments_BT: impl(T, None)


def _local(mesh: Mesh, attend: Callable[..., jax.Array], documents: jax.Array | None) -> AttentionFn:
    """Run ``attend(q, k, v, documents)`` on each device's sequences and heads. ``documents`` has a leading dim B."""
    specs = (_QKV, _QKV, _QKV, None if documents is None else PartitionSpec(BATCH))
    run = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=_QKV, check_vma=False)
    return lambda q_BTHh, k_BTKh, v_BTKh: run(q_BTHh, k_BTKh, v_BTKh, documents)


def _xla(mesh: Mesh, T: int, segments_BT: jax.Array | None) -> AttentionFn:
    block = query_block(mesh.devices.flat[0].platform)
    return _local(mesh, lambda q, k, v, segments_BT: causal(T, segments_BT, block)(q, k, v), segments_BT)


def _cudnn(mesh: Mesh, T: int, segments_BT: jax.Array | None) -> AttentionFn:
    """Flash attention of cuDNN. Its public interface has no documents, so it adds a bias of 2 T² bytes per sequence,
    which is made once for all layers."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, bias=bias, is_causal=True, implementation="cudnn")

    if segments_BT is None:
        return _local(mesh, attend, None)
    is_same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    never = jnp.asarray(-0.7 * jnp.finfo(jnp.bfloat16).max, jnp.bfloat16)
    return _local(mesh, attend, jnp.where(is_same, jnp.zeros((), jnp.bfloat16), never))


def _splash(mesh: Mesh, T: int, segments_BT: jax.Array | None, interpret: bool = False) -> AttentionFn:
    """Splash attention: flash attention for TPUs (arXiv 2205.14135) that skips fully masked blocks."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = next(size for size in (512, 256, _SPLASH_BLOCK) if T % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    sizes = splash.BlockSizes(**blocks)

    def local(q_BTHh: jax.Array, k_BSKh: jax.Array, v_BSKh: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        B, _, H, h = q_BTHh.shape
        segments_BT = jnp.zeros((B, T), jnp.int32) if segments_BT is None else segments_BT
        K = k_BSKh.shape[2]
        mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * (H // K))
        mqa: Any = splash.make_splash_mqa_single_device(mask, block_sizes=sizes, interpret=interpret)
        # [B, K, H/K, T, h]: each key/value head with its query heads. The kernel does not scale the queries.
        q = (q_BTHh * h**-0.5).reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4)
        k, v = (x.swapaxes(1, 2) for x in (k_BSKh, v_BSKh))
        heads = jax.vmap(mqa, in_axes=(0, 0, 0, None))
        out: Any = jax.vmap(lambda q, k, v, ids: heads(q, k, v, splash.SegmentIds(ids, ids)))(q, k, v, segments_BT)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, h)

    return _local(mesh, local, segments_BT)


def choose_dispatch(mesh: Mesh) -> tuple[ExpertDispatch, str]:
    """Return an expert dispatch for these devices and its description for the log."""
    if mesh.devices.flat[0].platform == "cpu" and mesh.shape["expert"] == 1:
        return every_expert, "dense, every expert runs on every token (fastest on a CPU)"
    return _grouped(mesh), "dropless, grouped matmul (ragged_dot)"


@functools.cache
def _grouped(mesh: Mesh) -> ExpertDispatch:
    return functools.partial(grouped, mesh)


def grouped(mesh: Mesh, x_BTD: jax.Array, choice: Routing, w1: jax.Array, w2: jax.Array, w3: jax.Array) -> jax.Array:
    """Run ``chosen_experts`` with experts sharded over the ``expert`` axis of a mesh.

    All-gathers the tokens along ``expert``, runs the local experts on them, and reduce-scatters the outputs.
    """

    def local(
        x: jax.Array, experts: jax.Array, weights: jax.Array, w1: jax.Array, w2: jax.Array, w3: jax.Array
    ) -> jax.Array:
        x, experts, weights = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, experts, weights))
        first_expert = jax.lax.axis_index("expert") * w1.shape[0]
        out = chosen_experts(x, Routing(experts, weights), w1, w2, w3, first_expert)
        return jax.lax.psum_scatter(jax.lax.psum(out, "tensor"), "expert", tiled=True)

    batch, up, down = PartitionSpec(BATCH), PartitionSpec("expert", "tensor"), PartitionSpec("expert", None, "tensor")
    specs = (batch, batch, batch, up, down, up)
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=batch, check_vma=False)
    return run(x_BTD, *choice, w1, w2, w3)
