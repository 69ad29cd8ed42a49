"""The precision of matrix products."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def matmul_precision(dtype: Any) -> jax.lax.Precision | None:
    """Precision of a product of arrays of a dtype: fp32 means fp32 on every backend.

    By default, GPUs multiply fp32 arrays in TF32 and TPUs in bf16, which changes losses in the third digit.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def fp32_einsum(dtype: Any) -> Callable[..., jax.Array]:
    """``jnp.einsum`` of arrays of a dtype, summed and returned in fp32."""
    return functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=matmul_precision(dtype))
