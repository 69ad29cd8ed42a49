"""Choosing an attention implementation, and parity of each with xla."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tli_jax.distributed.kernels import _cudnn, _splash, choose_attention
from tli_jax.distributed.mesh import make_mesh
from tli_jax.errors import UsageError
from tli_jax.models.attention import causal
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import ForwardOptions, Llama, init_params
from tli_jax.models.loss import summed_losses


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


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("has_documents", [False, True])
def test_cudnn_matches_xla_in_value_and_gradient(has_documents):
    mesh = make_mesh({}, jax.devices()[:1])
    rng = np.random.default_rng(0)
    B, T, H, K, h = 2, 1024, 8, 2, 64
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, h)), jnp.bfloat16) for n in (H, K, K))
    segments = jnp.asarray(np.cumsum(rng.random((B, T)) < 0.01, axis=1), jnp.int32) if has_documents else None
    weights = jnp.asarray(rng.normal(size=(B, T, H, h)), jnp.float32)

    def value_and_grad(attend, dtype):
        def total(*qkv):
            return (attend(*(x.astype(dtype) for x in qkv)).astype(jnp.float32) * weights).sum()

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

    expected, expected_grads = value_and_grad(causal(T, segments), jnp.float32)
    value, grads = value_and_grad(_cudnn(mesh, T, segments), jnp.bfloat16)
    np.testing.assert_allclose(value, expected, rtol=2e-2, atol=10)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        difference = np.linalg.norm(np.asarray(grad - expected_grad, np.float32))
        assert difference < 2e-2 * np.linalg.norm(np.asarray(expected_grad, np.float32))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="runs on a GPU above")
def test_cudnn_runs_once_a_layer_and_keeps_one_mask_for_all_layers(monkeypatch):
    """Traced only, without a GPU: with all but attention rematerialized."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    mesh = make_mesh({}, jax.devices()[:1])
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((2, 257), jnp.int32)

    def loss(params, tokens, segments, remat):
        options = ForwardOptions(jnp.bfloat16, remat, functools.partial(_cudnn, mesh))
        return summed_losses(Llama.from_params(config, params), tokens, segments, options=options)[0]

    for remat, forwards in (("none", 1), ("dots", 1), ("attention", 1), ("full", 2)):
        step = jax.grad(functools.partial(loss, remat=remat))
        text = str(jax.make_jaxpr(step)(params, tokens, tokens))
        assert text.count("dot_product_attention_fwd") == forwards, remat
        assert text.count("dot_product_attention_bwd") == 1
        assert "[3,2,1,256,256]" not in text  # a mask for each layer


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
