"""The basic NNX modules: linear, embedding and norm.

Every param is called ``weight``, has Hugging Face's layout and carries the letters of its dims as sharding metadata.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from tli_jax.models.config import LlamaConfig
from tli_jax.models.embedding import Lookup, look_up
from tli_jax.models.precision import matmul_precision

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
M = TypeVar("M", bound=nnx.Module)


def normal(std: float) -> Initializer:
    """N(0, ``std``), sampled in fp32 and rounded to the dtype of the param."""
    return lambda key, shape, dtype: (jax.random.normal(key, shape) * std).astype(dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.ones(shape, dtype)


def tensor_options(
    config: LlamaConfig, rngs: nnx.Rngs, param_dtype: Any, stack: tuple[int, ...] = ()
) -> Callable[[str], dict[str, Any]]:
    """Options of ``Weight`` for a tensor of ``config``'s tables, by its name without ``.weight``."""

    def options(name: str) -> dict[str, Any]:
        dims = (config.layer_tensors | config.outer_tensors)[f"{name}.weight"]
        init = ones if name.endswith("norm") else normal(config.initializer_range)
        return {"rngs": rngs, "init": init, "dims": dims, "stack": stack, "param_dtype": param_dtype}

    return options


def wrap_params(params: Mapping[str, Any], cls: Callable[..., M], *args: Any, **options: Any) -> M:
    """Return ``cls(*args, rngs=…, **options)`` around existing params. Copies and initialises nothing."""
    return nnx.merge(_graphdef(cls, *args, **options), nnx.State(dict(params)))


@functools.lru_cache
def _graphdef(cls: Callable[..., nnx.Module], *args: Any, **options: Any) -> nnx.GraphDef[Any]:
    return nnx.graphdef(jax.eval_shape(lambda: cls(*args, rngs=nnx.Rngs(0), **options)))


class Weight(nnx.Module):
    """A module with a single param, ``weight``.

    Args:
        shape: the shape in one layer.
        init: called with a key, the full shape and the dtype.
        dims: a letter for each dim, see ``tli_jax.models.config``. Stored as the param's ``out_sharding``; Flax does
            not act on it by itself.
        stack: leading dims: ``(L,)`` for stacked layers, ``(periods, L)`` in a grouped stack.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        init: Initializer = normal(0.02),  # noqa: B008
        dims: tuple[str | None, ...] | None = None,
        stack: tuple[int, ...] = (),
        param_dtype: Any = jnp.float32,
    ):
        names = (*(None,) * (len(stack) - 1), *("L",) * bool(stack), *(dims or (None,) * len(shape)))
        value = init(rngs.params(), (*stack, *shape), param_dtype)
        # Without eager_sharding=False, Flax would require a mesh.
        self.weight = nnx.Param(value, out_sharding=names, eager_sharding=False)


class Linear(Weight):
    """``[..., in] -> [..., out]`` without a bias; ``weight`` is ``[out, in]``. Other options as in ``Weight``."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, **options: Any):
        super().__init__((out_features, in_features), rngs=rngs, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("...i,oi->...o", x, self.weight[...].astype(x.dtype), precision=matmul_precision(x.dtype))


class Embed(Weight):
    """Token embedding, ``weight`` is ``[num_embeddings, features]``. Other options as in ``Weight``."""

    def __init__(self, num_embeddings: int, features: int, *, rngs: nnx.Rngs, **options: Any):
        super().__init__((num_embeddings, features), rngs=rngs, **options)

    def __call__(self, tokens: jax.Array, dtype: Any = None, lookup: Lookup = Lookup()) -> jax.Array:  # noqa: B008
        """Look up ``tokens``: ``[B, T] -> [B, T, features]`` in ``dtype``, by default that of the weight."""
        weight = self.weight[...]
        return look_up(lookup, dtype or weight.dtype, weight, tokens)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits of a tied head, ``[..., features] -> [..., num_embeddings]``."""
        return jnp.einsum("...i,oi->...o", x, self.weight[...].astype(x.dtype), precision=matmul_precision(x.dtype))


class RMSNorm(Weight):
    """Root mean square norm (arXiv 1910.07467), computed in fp32. Other options as in ``Weight``."""

    def __init__(self, features: int, *, eps: float = 1e-6, rngs: nnx.Rngs, init: Initializer = ones, **options: Any):
        super().__init__((features,), rngs=rngs, init=init, **options)
        self.eps = eps

    @classmethod
    def from_params(cls, params: Mapping[str, Any], eps: float) -> "RMSNorm":
        """Wrap ``{"weight": [features]}`` without copying it."""
        return wrap_params(params, cls, params["weight"].shape[-1], eps=eps)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * (x32 * scale).astype(x.dtype)
