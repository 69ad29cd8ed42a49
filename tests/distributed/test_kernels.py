"""Choosing an attention implementation, and parity of each with xla."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tli_jax.distributed.kernels import _splash, choose_attention
from tli_jax.distributed.mesh import make_mesh
from tli_jax.errors import UsageError
from tli_jax.models.attention import causal


def test_auto_is_xla_on_a_cpu():
    mesh = make_mesh({})
    assert choose_attention("auto", mesh, 128, 64, "bfloat16")[1] == "xla, within documents"
    assert choose_attention("xla", mesh, 100, 8, "float32")[1] == "xla, within documents"


def test_attention_without_isolation_crosses_documents():
    mesh = make_mesh({}, jax.devices()[:1])
    impl, description = choose_attention("xla", mesh, 8, 4, "float32", isolate=False)
    assert description == "xla, across documents"
    qkv = tuple(jax.random.normal(key, (1, 8, 2, 4)) for key in jax.random.split(jax.random.key(0), 3))
    segments = jnp.asarray([[0, 0, 0, 1, 1, 1, 2, 2]])
    np.testing.assert_array_equal(impl(8, segments)(*qkv), causal(8, None)(*qkv))
    assert np.abs(impl(8, segments)(*qkv) - causal(8, segments)(*qkv)).max() > 0.1


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_implementation_of_another_platform_is_refused(name):
    if jax.devices()[0].platform != "cpu":
        pytest.skip("only on a CPU")
    with pytest.raises(UsageError, match=f"attention: {name} runs on .*, this is cpu: choose xla or auto"):
        choose_attention(name, make_mesh({}), 128, 64, "bfloat16")


@pytest.mark.parametrize("has_documents", [False, True])
def test_splash_matches_xla_in_value_and_gradient(has_documents):
    """Runs the kernel in Pallas' interpreter, without a TPU, sharded over batch and heads."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rng = np.random.default_rng(0)
    B, T, H, K, h = 4, 128, 4, 2, 64
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, h)), jnp.float32) for n in (H, K, K))
    segments = jnp.asarray(np.cumsum(rng.random((B, T)) < 0.03, axis=1), jnp.int32) if has_documents else None
    weights = jnp.asarray(rng.normal(size=(B, T, H, h)), jnp.float32)

    def value_and_grad(attend):
        return jax.jit(jax.value_and_grad(lambda *qkv: (attend(*qkv) * weights).sum(), argnums=(0, 1, 2)))(q, k, v)

    expected, expected_grads = value_and_grad(causal(T, segments))
    value, grads = value_and_grad(_splash(mesh, T, segments, interpret=True))
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, atol=2e-5)
