"""The scan: losses of plans without growing them."""

import jax
import numpy as np
import pytest

import tli_jax
from tli_jax.distributed.mesh import make_mesh, param_sharding
from tli_jax.errors import UsageError
from tli_jax.models.tree import nest
from tli_jax.verify import scan as scanning
from tli_jax.verify.scan import Scanner, base_steps, scan

L = 12
# Copies, factors, weighted sums, missing layers, identities.
PLANS = {
    "base": tli_jax.custom(L, "0-11"),
    "half": tli_jax.tli(L, 3, "half"),
    "quarters": tli_jax.custom(L, "0-4, 5*0.75, 5*0.25, 6-11"),
    "average": tli_jax.average(L, 4),
    "dus": tli_jax.dus(L, 3),
    "bypass": tli_jax.custom(L, "0-3, 5-11"),
    "identity": tli_jax.tli(L, 4),
}


@pytest.fixture(scope="module")
def base():
    return tli_jax.load_hf("embedded", dtype="float32")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 1000, (3, 64))


@pytest.fixture(scope="module")
def losses(base, tokens) -> dict[str, float]:
    return dict(zip(PLANS, scan(*base, tokens, list(PLANS.values())), strict=True))


def test_losses_are_those_of_the_grown_model(base, tokens, losses) -> None:
    config, params = base
    for name, plan in PLANS.items():
        grown = tli_jax.losses(config, tli_jax.inject(params, plan), tokens).mean()
        assert losses[name] == pytest.approx(float(grown), abs=1e-5), name
    assert losses["identity"] == losses["base"] and len(set(losses.values())) == len(PLANS) - 1


def test_losses_are_those_of_transformers(base, tokens, losses, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config, params = base
    windows = torch.tensor(tokens)
    for name in ("half", "quarters", "average", "dus", "bypass"):
        plan = PLANS[name]
        tli_jax.save_hf(tmp_path / name, config, tli_jax.inject(params, plan), plan=plan)
        with torch.no_grad():
            loss = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(
                windows, labels=windows
            ).loss
        assert losses[name] == pytest.approx(loss.item(), abs=1e-5), name


def test_shared_prefixes_run_once_and_dropped_states_are_computed_again(base, tokens) -> None:
    config, params = base
    steps = base_steps(L)
    plans = [steps, *((*steps[:i], *steps[i + 1 :]) for i in range(L))]  # the base, and each layer bypassed
    roomy = Scanner(config, params, tokens)
    tight = Scanner(config, params, tokens, kept_bytes=1)
    assert roomy.losses(plans) == tight.losses(plans)
    assert roomy.layers_run == L + sum(range(L)) < tight.layers_run < L * L


def test_no_plan_compiles_anew(base, tokens, losses) -> None:
    compiled = scanning._run._cache_size()
    scan(*base, tokens, [tli_jax.midas(L, 5), tli_jax.stack(L)])
    assert scanning._run._cache_size() == compiled


def test_on_a_mesh(base, tokens, losses) -> None:
    config, params = base
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    dims = {f"layers.{name}": ("L", *dims) for name, dims in config.layer_tensors.items()} | config.outer_tensors
    shardings = nest({name: param_sharding(mesh, letters) for name, letters in dims.items()})
    sharded = jax.device_put(params, shardings)
    assert scan(config, sharded, tokens, list(PLANS.values())) == pytest.approx(list(losses.values()), abs=1e-5)


def test_what_cannot_be_scanned_is_refused(base, tokens) -> None:
    with pytest.raises(UsageError, match="made for a base of 11 layers, this one has 12"):
        scan(*base, tokens, [tli_jax.tli(11)])
    with pytest.raises(UsageError, match=r"layer 4 \(3~, init noise\) cannot be scanned: grow it"):
        scan(*base, tokens, [tli_jax.tli(L, 4, "noise")])
