"""Compiler options by device, passed with each compilation of a train step. Their effect on speed is not measured."""

import os
import re
from typing import Any

# By the prefix of ``jax.Device.device_kind``; all that match apply.
_TPU = {
    # Overlap all-gathers of weights and reduce-scatters of gradients with matrix products.
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    # Overlap the all-reduce of gradients over the `data` axis with the backward pass of the next layer.
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}
# Allow larger matrix tiles: v6e has more fast memory than the default uses.
_V6E = {"xla_tpu_scoped_vmem_limit_kib": 98304}
_NVIDIA = {
    # Overlap collectives with compute, and combine small ones.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 134217728,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 134217728,
}
OPTIONS = {"TPU v5": _TPU, "TPU v6": _TPU | _V6E, "NVIDIA": _NVIDIA}


def xla_options(device: Any) -> dict[str, bool | int]:
    """Options for a device. A flag in XLA_FLAGS or LIBTPU_INIT_ARGS takes the place of ours."""
    text = f"{os.environ.get('XLA_FLAGS', '')} {os.environ.get('LIBTPU_INIT_ARGS', '')}"
    chosen = set(re.findall(r"--(\w+)", text))
    return {
        name: value
        for kind, options in OPTIONS.items()
        if device.device_kind.startswith(kind)
        for name, value in options.items()
        if name not in chosen
    }
