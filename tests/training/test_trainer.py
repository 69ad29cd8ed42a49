"""``tli_jax.Trainer``, driven by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tli_jax
from tli_jax.cli.train_config import TrainConfig
from tli_jax.data.batches import open_data
from tli_jax.distributed.mesh import param_sharding
from tli_jax.errors import UsageError
from tli_jax.training.train import train
from tli_jax.training.trainer import Trainer

RECIPE = {
    "batch_size": 16,
    "sequence_length": 16,
    "steps": 4,
    "learning_rate": {"all": 1e-2, "injected": 2e-2},
    "warmup": {"all": 2},
    "only": "injected",
    "grad_accum_steps": 2,
    "mesh": {"fsdp": 4, "data": 2},
}
PLAN = tli_jax.tli(4, every=2)


@pytest.fixture(scope="module")
def base(start):
    """Configuration of the base, params of the grown model, and a trainer for one device."""
    config, params = tli_jax.load_hf(start / "base")
    options = RECIPE | {"mesh": {}, "grad_accum_steps": 1, "dtypes": {"compute": "float32"}}
    trainer = Trainer.create(config, plan=PLAN, devices=jax.devices()[:1], **options)
    return config, tli_jax.inject(params, PLAN), trainer


@pytest.fixture(scope="module")
def tokens(start):
    return np.load(start / "ids.npy")[: 16 * 17].reshape(16, 17).astype(np.int32)


def test_steps_by_hand_equal_the_command_bit_for_bit(start, tmp_path):
    run = TrainConfig(
        **RECIPE, model=str(start / "grown"), text=str(start / "ids.npy"), run=str(tmp_path / "run"), validate_every=4
    )
    trained = train(run, advance=lambda amount, note="", /: None)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    config, params = tli_jax.load_hf(start / "grown")
    trainer = Trainer.create(config, plan=PLAN, **RECIPE)
    state = trainer.init_from(params)
    data = open_data(run, config, None, "", 16, tmp_path)
    batches = data.batches(0, 16, range(16), run.seed)
    for line, (tokens_BT, segments_BT) in zip(lines, batches, strict=False):
        state, metrics = trainer.train_step(state, tokens_BT, segments_BT)
        assert {name: array.item() for name, array in metrics.items()} == {name: line[name] for name in metrics}
    by_hand = state.train.trained | state.frozen
    jax.tree.map(np.testing.assert_array_equal, by_hand, trained.trained | trained.frozen)
    batch = next(data.validation(16, range(16), 1))
    assert trainer.evaluate(state, *batch) == pytest.approx(lines[-1]["validation_loss"], rel=0.05)


def test_params_train_and_come_back(base, tokens):
    config, params, trainer = base
    state = trainer.init_from(params)
    before = trainer.evaluate(state, tokens)
    grown = tli_jax.grown_config(config, PLAN)
    assert before == pytest.approx(float(tli_jax.losses(grown, params, jnp.asarray(tokens)).mean()), rel=1e-5)
    jax.tree.map(np.testing.assert_array_equal, trainer.params(state), params)
    for _ in range(4):
        state, metrics = trainer.train_step(state, tokens)
    assert float(metrics["loss"]) < before and set(metrics) == {
        *("loss", "gradient_norm", "skipped", "learning_rate_injected")
    }
    after = trainer.params(state)
    trainer.train_step(state, tokens)  # donates the state, but not these params or those it started with
    assert trainer.params(trainer.init_from(after), "bfloat16")["norm"]["weight"].dtype == jnp.bfloat16
    changed = jax.tree.map(lambda x, y: np.any(np.asarray(x) != y, axis=tuple(range(1, x.ndim))), after, params)
    assert not any(np.any(changed[name]["weight"]) for name in ("embed_tokens", "norm", "lm_head"))
    for moved in jax.tree.leaves(changed["layers"]):
        np.testing.assert_array_equal(moved, PLAN.injected)


def test_params_of_another_mesh_are_taken(base, tokens):
    config, params, trainer = base
    expected = trainer.evaluate(trainer.init_from(params), tokens[:5])
    sharded = Trainer.create(config, plan=PLAN, **RECIPE | {"dtypes": {"compute": "float32"}})
    shardings = {spec.name: param_sharding(sharded.mesh, spec.dims) for spec in sharded.param_specs}
    for part in sharded.shard(jax.device_get(params)):
        assert {name: array.sharding for name, array in part.items()} == {name: shardings[name] for name in part}
    state = sharded.init_from(params)
    assert sharded.evaluate(state, tokens[:5]) == pytest.approx(expected, rel=1e-5)  # 5 rows on 8 devices
    on_one_device = trainer.init_from(sharded.params(state))
    assert trainer.evaluate(on_one_device, tokens[:5]) == expected
    assert trainer.evaluate(trainer.init_from(jax.device_get(params)), tokens[:5]) == expected


def test_padding_and_documents(base, tokens):
    _, params, trainer = base
    state = trainer.init_from(params)
    padded = np.where(np.arange(17) < 9, tokens, -1)
    assert trainer.evaluate(state, padded) == pytest.approx(trainer.evaluate(state, tokens[:, :9]), rel=1e-5)
    segments = np.broadcast_to(np.arange(17) >= 9, (16, 17))
    halves = [trainer.evaluate(state, half) * half[:, 1:].size for half in (tokens[:, :9], tokens[:, 9:])]
    assert trainer.evaluate(state, tokens, segments) == pytest.approx(sum(halves) / (16 * 15), rel=1e-5)
    assert np.isnan(trainer.evaluate(state, np.full((2, 17), -1)))
    assert np.isnan(trainer.evaluate(state, np.zeros((0, 17), int)))


def test_wrong_options_and_shapes_are_refused(base, tokens):
    config, params, trainer = base
    for options, message in [
        ({"lerning_rate": 1}, "Trainer.create: key 'lerning_rate' is not known, .*learning_rate"),
        ({"run": "x"}, "Trainer.create: run: only for tli-jax train"),
        ({"steps": "many"}, "Trainer.create: steps is 'many'"),
        ({"only": "injected"}, "injected needs a grown model"),
        ({"mesh": {"tensor": 3}}, "mesh"),
    ]:
        with pytest.raises(UsageError, match=message):
            Trainer.create(config, **options)
    with pytest.warns(UserWarning, match="sequence_length 100 is larger than the model's context, 64"):
        Trainer.create(config, sequence_length=100)
    state = trainer.init_from(params)
    with pytest.raises(ValueError, match=r"tokens_BT has shape \(16, 16\)"):
        trainer.train_step(state, tokens[:, :16])
    with pytest.raises(ValueError, match="tokens_BT has ids from 0 to 64, the vocabulary has 64"):
        trainer.train_step(state, np.where(tokens == 63, 64, tokens))
    with pytest.raises(ValueError, match=f"tokens_BT has ids from 0 to {2**32}, the vocabulary has 64"):
        trainer.train_step(state, np.where(tokens == 63, 2**32, tokens.astype(np.int64)))
    with pytest.raises(ValueError, match="tokens_BT has dtype float64, ids are integers"):
        trainer.evaluate(state, tokens + 0.5)
    with pytest.raises(ValueError, match=r"segments_BT \(16, 16\)"):
        trainer.evaluate(state, tokens, tokens[:, :16])
