"""Which kernels a run uses, for attention and for experts: chosen once, said in its log, each behind the one type that
the model knows (``models.attention.AttentionImpl``, ``models.moe.ExpertDispatch``)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tli_jax.distributed.mesh import BATCH
from tli_jax.errors import UsageError
from tli_jax.models.attention import AttentionFn, AttentionImpl, causal
from tli_jax.models.moe import ExpertDispatch, Routing, chosen_experts, every_expert

_QKV = PartitionSpec(BATCH, None, "tensor", None)
_PLATFORM = {"cudnn": "gpu", "splash": "tpu"}
_SPLASH_BLOCK = 128  # the lanes of a TPU: T must be a multiple


def choose_attention(
    name: str, mesh: Mesh, T: int, head_dim: int, dtype: str, isolate: bool = True
) -> tuple[AttentionImpl, str]:
    """The kernel of that name, ``auto`` for the best that runs here, and a line for the log.

    Args:
        T: tokens a sequence.
        dtype: in which attention is computed.
        isolate: whether attention is to stay within documents.

    Raises:
        UsageError: it does not run on this platform, or not at this size or dtype.
    """
    platform = mesh.devices.flat[0].platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    why_not = {
        "cudnn": ""
        if dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= 128
        else "bfloat16 and heads up to 128",
        "splash": "" if T % _SPLASH_BLOCK == 0 else f"a sequence_length that is a multiple of {_SPLASH_BLOCK}",
    }
    if name == "auto":
        fast = next((kernel for kernel, where in _PLATFORM.items() if where == platform and not why_not[kernel]), None)
        name = fast or "xla"
    elif name in _PLATFORM and _PLATFORM[name] != platform:
        raise UsageError(f"attention: {name} runs on {_PLATFORM[name]}, this is {platform}: choose xla or auto")
    elif why_not.get(name):
        raise UsageError(f"attention: {name} needs {why_not[name]}: choose xla or auto")
    if name == "cudnn":
        crosses = "; warning: it crosses document boundaries, although isolate is set" if isolate else ""
        return _cudnn, f"cudnn, across the documents of a window{crosses}"
    kernel: AttentionImpl = causal if name == "xla" else functools.partial(_splash, mesh)
    if isolate:
        return kernel, f"{name}, within documents"
    return lambda T, segments_BT: kernel(T, None), f"{name}, across the documents of a window"


def _cudnn(T: int, segments_BT: jax.Array | None) -> AttentionFn:
    # Its only way to keep documents apart is a bias of [B, T, T], the memory that it is there to save.
    return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")


def _splash(mesh: Mesh, T: int, segments_BT: jax.Array | None, interpret: bool = False) -> AttentionFn:
    """Splash attention: flash attention for TPUs (arXiv 2205.14135) that skips blocks which are masked anyway."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = next(size for size in (512, 256, _SPLASH_BLOCK) if T % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    sizes = splash.BlockSizes(**blocks)

    def local(q_BTHh: jax.Array, k_BSKh: jax.Array, v_BSKh: jax.Array, segments_BT: jax.Array) -> jax.Array:
        B, _, H, h = q_BTHh.shape
        K = k_BSKh.shape[2]
        mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * (H // K))
        one: Any = splash.make_splash_mqa_single_device(mask, block_sizes=sizes, interpret=interpret)
        # [B, K, H/K, T, h]: one key/value head with its queries at a time. The kernel does not scale by itself.
        q = (q_BTHh * h**-0.5).reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4)
        k, v = (x.swapaxes(1, 2) for x in (k_BSKh, v_BSKh))
        heads = jax.vmap(one, in_axes=(0, 0, 0, None))
        out: Any = jax.vmap(lambda q, k, v, ids: heads(q, k, v, splash.SegmentIds(ids, ids)))(q, k, v, segments_BT)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, h)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        ids = jnp.zeros(q.shape[:2], jnp.int32) if segments_BT is None else segments_BT
        specs = (_QKV, _QKV, _QKV, PartitionSpec(_QKV[0], None))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=_QKV, check_vma=False)(q, k, v, ids)

    return attend


def choose_dispatch(mesh: Mesh) -> tuple[ExpertDispatch, str]:
    """How experts are run on these devices, and a line for the log."""
    if mesh.devices.flat[0].platform == "cpu" and mesh.shape["expert"] == 1:
        return every_expert, "all run on all tokens, as this is a CPU"
    return functools.partial(grouped, mesh), "grouped products of the chosen ones (ragged_dot), no token dropped"


def grouped(mesh: Mesh, x_BTD: jax.Array, choice: Routing, w1: jax.Array, w2: jax.Array, w3: jax.Array) -> jax.Array:
    """``chosen_experts`` over a mesh: devices along ``expert`` bring their tokens together, each runs those that chose
    its experts, and what comes out is summed and given back."""

    def local(
        x: jax.Array, experts: jax.Array, weights: jax.Array, w1: jax.Array, w2: jax.Array, w3: jax.Array
    ) -> jax.Array:
        x, experts, weights = (jax.lax.all_gather(part, "expert", tiled=True) for part in (x, experts, weights))
        first = jax.lax.axis_index("expert") * w1.shape[0]
        out = chosen_experts(x, Routing(experts, weights), w1, w2, w3, first)
        return jax.lax.psum_scatter(jax.lax.psum(out, "tensor"), "expert", tiled=True)

    rows, wide, down = PartitionSpec(BATCH), PartitionSpec("expert", "tensor"), PartitionSpec("expert", None, "tensor")
    specs = (rows, rows, rows, wide, down, wide)
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return run(x_BTD, *choice, w1, w2, w3)
