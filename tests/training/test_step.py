"""One step: equal on every mesh and to torch, without needless FLOPs, and harmless if its loss or gradient is bad."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tli_jax.cli.train_config import TrainConfig
from tli_jax.distributed.mesh import batch_sharding, replicated
from tli_jax.hf.save import save_hf
from tli_jax.training.freezing import group
from tli_jax.training.step import UNCOMPILED

MESHES = {"8x1": {"fsdp": 8}, "4x2": {"data": 4, "fsdp": 2}}
MESHES |= {"2x2x2": {"data": 2, "fsdp": 2, "tensor": 2}}


def shard(trainer, batch):
    return tuple(jax.device_put(x, trainer.batch_sharding) for x in batch)


def stop(trainer):
    return jax.device_put(np.zeros(trainer.mesh.size, np.int32), batch_sharding(trainer.mesh, ("B",)))


def train(trainer, trained, frozen, batches):
    """Losses of some steps, and the final state."""
    state, losses = trainer.init(trained), []
    for batch in batches:
        state, metrics = trainer.step(state, frozen, *shard(trainer, batch), stop(trainer))
        losses.append(float(metrics["loss"]))
    return losses, state


def train_with_gradients(trainer, trained, frozen, batch):
    """Losses of three steps, the gradients of the first (as Adam's first moment, scaled), and the compiled program."""
    state = trainer.init(trained)
    arguments = (frozen, *shard(trainer, batch), stop(trainer))
    program = trainer.step.lower(state, *arguments).compile()
    losses, gradients = [], {}
    for _ in range(3):
        state, metrics = program(state, *arguments)
        losses.append(float(metrics["loss"]))
        # Fetched now because the next step donates the state.
        gradients = gradients or {n: np.asarray(x) for n, x in optax.tree.get(state.optimizer_state, "mu").items()}
    return losses, gradients, program.as_text()


@pytest.fixture(scope="module")
def on_one_device(build, batch):
    """``train_with_gradients`` on one device, by ``only``."""
    results = {}

    def run(only):
        if only not in results:
            results[only] = train_with_gradients(*build(only=only, learning_rate=1e-2, clip_norm=0), batch)
        return results[only]

    return run


def check_gradients(gradients, expected):
    for name, gradient in gradients.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("only", ["all", "injected"])
def test_every_mesh_gives_equal_steps_and_gathers_one_layer_at_a_time(build, batch, on_one_device, mesh, only):
    trainer = build(MESHES[mesh], only=only, learning_rate=1e-2, clip_norm=0)
    losses, gradients, text = train_with_gradients(*trainer, batch)
    expected, expected_gradients, _ = on_one_device(only)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    check_gradients(gradients, expected_gradients)
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
    shapes = [tuple(map(int, dims.split(","))) for dims in gathered if dims]
    assert shapes, "a sharded model needs all-gathers"
    # The largest matrix of a layer is F x D. Embedding and head, which have a V dim, are not stacks.
    assert max(np.prod(shape) for shape in shapes if not {72, 36} & set(shape)) <= 56 * 40


def test_equal_programs_share_their_compilation(build):
    """Options that do not count as part of a program indeed do not change it, and all others make another one."""
    others = {"seed": 5, "batch_size": 16, "text": ("a.txt",), "run": "elsewhere", "save_every": 7, "verify": True}
    others |= {"isolate": False, "attention": "xla", "skip_limit": 3, "profile": 2, "validation_fraction": 0.1}
    trainer, other = build()[0], build(**others)[0]
    assert trainer == other and trainer.step is other.step and trainer.validate is other.validate
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert others.keys() <= UNCOMPILED <= names
    both = [lower(one, one._jitted_step) for one in (trainer, dataclasses.replace(other))]
    assert both[0] == both[1]
    changed: dict[str, Any] = {"dtypes": {"compute": "bfloat16"}, "steps": 7, "schedule": "wsd", "optimizer": "lion"}
    changed |= {"learning_rate": {"all": 1e-3}, "warmup": {"all": 3}, "adam": {"b1": 0.8}, "weight_decay": 0.0}
    changed |= {"decay_fraction": 0.5, "final_fraction": 0.0, "clip_norm": 2.0, "remat": "full", "spike": 0.0}
    changed |= {"grad_accum_steps": 2, "auxiliary": {"z": 0.1}}
    assert changed.keys() == names - UNCOMPILED
    for name, value in changed.items():
        assert build(**{name: value})[0] != trainer, name
    assert build(only="injected")[0] != trainer and build({"fsdp": 8})[0] != trainer


def lower(trainer, step) -> str:
    """The lowered step, whose text is that of equal programs only."""
    state = trainer.abstract_state()
    tokens = jax.ShapeDtypeStruct((1, 8, 17), jnp.int32)
    return step.lower(state, {}, tokens, tokens, jax.ShapeDtypeStruct((1,), jnp.int32)).as_text()


def count_flops(jaxpr) -> int:
    """2 FLOPs per multiply-add of every matrix product, scans unrolled."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            contracted = np.prod([eqn.invars[0].aval.shape[i] for i in contracting])
            total += 2 * int(contracted) * int(np.prod(eqn.outvars[0].aval.shape))
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in inner_jaxprs(eqn):
            total += times * count_flops(inner)
    return total


def inner_jaxprs(eqn):
    for value in eqn.params.values():
        for part in value if isinstance(value, list | tuple) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def dots(jaxpr):
    """The matrix products of a program, each once."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for inner in inner_jaxprs(eqn):
            yield from dots(inner)


def test_no_product_with_the_vocabulary_has_an_fp32_operand_in_a_bfloat16_step(build, batch):
    """fp32 operands would be multiplied in TF32 on a GPU, at half the speed."""
    trainer, trained, frozen = build(dtypes={"compute": "bfloat16"}, auxiliary={"z": 1e-3})
    tokens, segments = (x[0] for x in batch)
    jaxpr = jax.make_jaxpr(jax.grad(lambda *a: trainer._sums(*a)[0]))(trained, frozen, tokens, segments)
    V = trainer.model.vocab_size
    with_head = [eqn for eqn in dots(jaxpr.jaxpr) if any(V in v.aval.shape for v in (*eqn.invars, *eqn.outvars))]
    assert len(with_head) == 3  # logits, and the gradients of hidden states and head
    assert all(v.aval.dtype == jnp.bfloat16 for eqn in with_head for v in eqn.invars)
    assert all(eqn.outvars[0].aval.dtype == jnp.float32 for eqn in with_head)


def test_gradients_of_embedding_and_head_are_never_all_reduced_whole(build, batch):
    trainer, trained, frozen = build({"fsdp": 8}, learning_rate=1e-2)
    arguments = (trainer.init(trained), frozen, *shard(trainer, batch), stop(trainer))
    text = trainer.step.lower(*arguments).compile().as_text()
    # XLA for CPUs writes a reduce-scatter as an all-reduce of a [V, D] array and a slice.
    reduced = re.findall(r"= \(?\w+\[72,40\]\S* (all-reduce|reduce-scatter)\(", text)
    assert len(reduced) <= 1, "the gradient of the head alone is reduced, once"
    assert not re.search(r"\[72,40\]\S* all-gather\([^)]*embed", text)


@pytest.mark.parametrize("outer", [None, "all"])
@pytest.mark.parametrize("only", ["all", "injected", "last_n(3)", "layers(0,6)"])
def test_a_step_has_exactly_the_stated_flops(build, only, outer):
    trainer, trained, frozen = build(only=only, outer=outer, remat="none")
    B, T = 8, 16
    tokens = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
    jaxpr = jax.make_jaxpr(jax.grad(lambda *a: trainer._sums(*a)[0]))(trained, frozen, tokens, tokens)
    # Causal attention counts half, but this kernel computes all of it: the same as at twice the context.
    assert count_flops(jaxpr.jaxpr) == B * T * trainer.flops_per_token(2 * T)


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
@pytest.mark.parametrize("only", ["all", "injected"])
def test_each_policy_computes_again_what_it_says(build, only, remat):
    trainer, trained, frozen = build(only=only, remat=remat)
    B, T = 8, 16
    tokens = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
    jaxpr = jax.make_jaxpr(jax.grad(lambda *a: trainer._sums(*a)[0]))(trained, frozen, tokens, tokens)
    again = count_flops(jaxpr.jaxpr) / (B * T) - trainer.flops_per_token(2 * T)
    sizes, layers = trainer.model.sizes, trainer.model.num_hidden_layers - trainer.layout.lowest
    # The output of down_proj is not needed, and those of q, k and v are kept where attention is not repeated.
    feed_forward = 2 * sizes["D"] * (sizes["Hh"] + 2 * sizes["F"])
    attention = 4 * sizes["Hh"] * T + 2 * sizes["D"] * (sizes["Hh"] + 2 * sizes["Kh"])
    expected = {"none": 0, "dots": 0, "attention": feed_forward, "full": feed_forward + attention}
    assert again == layers * expected[remat]


def test_gradient_accumulation_gives_the_step_of_the_complete_batch(build, batch):
    rng = np.random.default_rng(3)
    batches = [tuple(np.asarray(rng.permutation(x.swapaxes(0, 1)).swapaxes(0, 1)) for x in batch) for _ in range(3)]
    trainer, trained, frozen = build(only="injected", learning_rate=1e-2, auxiliary={"z": 1e-3})
    complete, _ = train(trainer, trained, frozen, batches)
    trainer, trained, frozen = build(only="injected", learning_rate=1e-2, auxiliary={"z": 1e-3}, grad_accum_steps=4)
    accumulated, _ = train(trainer, trained, frozen, [tuple(x.reshape(4, 2, 17) for x in b) for b in batches])
    np.testing.assert_allclose(accumulated, complete, rtol=1e-5)


def test_attention_stays_within_a_document(build, batch):
    trainer, trained, frozen = build()
    tokens, segments = (x[0] for x in batch)
    other = tokens.copy()
    other[:, :5] = (other[:, :5] + 1) % 72  # in the first document

    def losses(tokens, segments):
        from tli_jax.models.llama import Llama
        from tli_jax.models.loss import token_losses
        from tli_jax.training.freezing import as_model

        llama = Llama.from_params(trainer.model, as_model(trained, frozen, trainer.param_specs))
        return np.asarray(token_losses(llama, jnp.asarray(tokens), segments_BT=jnp.asarray(segments))[0])

    same = losses(tokens, segments) == losses(other, segments)
    assert same[::2, 9:].all()  # all inputs of these targets are in the second document
    assert not same[1::2, 9:].any()  # rows with one document


def test_padding_adds_no_loss(build, batch):
    trainer, trained, frozen = build()
    tokens, segments = (x[0] for x in batch)
    loss, count = trainer.validate(trained, frozen, tokens[:4], segments[:4])
    padded, padded_count = trainer.validate(trained, frozen, np.where(np.arange(8)[:, None] < 4, tokens, -1), segments)
    assert int(count) == int(padded_count) == 4 * 16 - 2  # the first tokens of two documents are not targets
    np.testing.assert_allclose(padded, loss, rtol=1e-6)


def test_z_loss_is_the_squared_log_partition_function(build, batch):
    trainer, trained, frozen = build(auxiliary={"z": 1e-2})
    tokens, segments = (x[0] for x in batch)
    total, (loss, _) = trainer._sums(trained, frozen, tokens, segments)
    from tli_jax.models.llama import Llama
    from tli_jax.training.freezing import as_model

    llama = Llama.from_params(trainer.model, as_model(trained, frozen, trainer.param_specs))
    hidden, _, _ = llama.hidden(tokens[:, :-1], segments_BT=segments[:, :-1])
    log_z = jax.nn.logsumexp(llama.logits(hidden), axis=-1) * (segments[:, 1:] == segments[:, :-1])
    np.testing.assert_allclose(total - loss, 1e-2 * jnp.square(log_z).sum(), rtol=1e-4)


@pytest.mark.parametrize(("remat", "only"), [("full", "injected"), ("dots", "all"), ("attention", "injected")])
def test_rematerialization_keeps_the_gradients(build, batch, on_one_device, remat, only):
    trainer = build(only=only, remat=remat, learning_rate=1e-2, clip_norm=0)
    check_gradients(train_with_gradients(*trainer, batch)[1], on_one_device(only)[1])


def test_bfloat16_compute_with_bfloat16_frozen_and_float32_trained(build, batch):
    trainer, trained, frozen = build(only="injected", dtypes={"compute": "bfloat16"}, learning_rate=1e-2)
    frozen = {name: x.astype(jnp.bfloat16) for name, x in frozen.items()}
    losses, state = train(trainer, trained, frozen, [batch] * 8)
    assert losses[-1] < losses[0] - 0.1
    assert {x.dtype for x in state.trained.values()} == {np.dtype("float32")}


class TestBadSteps:
    """A step whose loss or gradient is not finite, or whose gradient spikes, changes only the counts."""

    def test_not_finite(self, build, batch):
        trainer, trained, frozen = build(learning_rate=1e-2)
        broken = trained | {"norm.weight": trained["norm.weight"].at[3].set(jnp.nan)}
        before = {name: np.asarray(x) for name, x in broken.items()}
        _, state = train(trainer, broken, frozen, [batch] * 2)
        assert (int(state.step), int(state.skipped)) == (2, 2)
        jax.tree.map(np.testing.assert_array_equal, state.trained, before)
        assert all(not np.asarray(x).any() for x in jax.tree.leaves(state.optimizer_state))

    def test_spike(self, build, batch):
        trainer, trained, frozen = build(only="injected", spike=3.0, learning_rate=1e-3)
        losses, state = train(trainer, trained, frozen, [batch] * 21)
        assert int(state.skipped) == 0 and losses[-1] < losses[0]
        # A smaller running mean makes the next gradient a spike.
        state = state._replace(norm=jax.device_put(state.norm / 100, replicated(trainer.mesh)))
        before = {name: np.asarray(x) for name, x in state.trained.items()}
        state, metrics = trainer.step(state, frozen, *shard(trainer, batch), stop(trainer))
        assert int(metrics["skipped"]) == 1
        jax.tree.map(np.testing.assert_array_equal, state.trained, before)
        # The first good step resets the count.
        state = state._replace(norm=jax.device_put(state.norm * 100, replicated(trainer.mesh)))
        state, metrics = trainer.step(state, frozen, *shard(trainer, batch), stop(trainer))
        assert int(metrics["skipped"]) == 0
        assert any((np.asarray(x) != before[name]).any() for name, x in state.trained.items())

    def test_the_logged_learning_rate_is_the_applied_one_and_the_schedule_ends(self, build, batch):
        """Lion moves every parameter by exactly the learning rate."""
        options = {"learning_rate": 1e-2, "clip_norm": 0, "weight_decay": 0, "spike": 3.0, "validate_every": 1000}
        trainer, trained, frozen = build(optimizer="lion", schedule="cosine", steps=24, final_fraction=0.0, **options)
        _, state = train(trainer, trained, frozen, [batch] * 21)
        arguments = (frozen, *shard(trainer, batch), stop(trainer))
        norm = np.asarray(state.norm)
        state, metrics = trainer.step(state._replace(norm=jnp.asarray(norm / 1000)), *arguments)
        assert int(metrics["skipped"]) == 1
        before = np.asarray(state.trained["lm_head.weight"])
        state, metrics = trainer.step(state._replace(norm=jnp.asarray(norm)), *arguments)
        moved = np.abs(np.asarray(state.trained["lm_head.weight"]) - before)
        np.testing.assert_allclose(np.median(moved), float(metrics["learning_rate_outer"]), rtol=1e-3)
        state, metrics = trainer.step(state, *arguments)
        assert int(state.step) == 24 and float(metrics["learning_rate_outer"]) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("only", ["all", "injected"])
def test_ten_steps_of_adamw_match_torch(model, params, build, tmp_path, only):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(5)
    batches = [rng.integers(0, 72, (1, 4, 25)).astype(np.int32) for _ in range(10)]
    options = {
        "learning_rate": 3e-3,
        "adam": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
        "weight_decay": 0.1,
        "clip_norm": 1.0,
    }
    trainer, trained, frozen = build(only=only, schedule="constant", remat="full", **options)
    actual, _ = train(trainer, trained, frozen, [(tokens, np.zeros_like(tokens)) for tokens in batches])

    save_hf(tmp_path / "model", model, params)
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    trains = {f".{layer}." for spec in trainer.param_specs if spec.trains for layer in spec.layers}
    decayed, others = [], []
    for name, parameter in llama.named_parameters():
        in_layer = re.search(r"\.\d+\.", name)
        parameter.requires_grad = in_layer[0] in trains if in_layer else only == "all"
        is_decayed = parameter.ndim == 2 and "embed" not in name
        (decayed if is_decayed else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    expected = []
    for tokens in batches:
        ids = torch.tensor(tokens[0], dtype=torch.long)
        logits = llama(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 72), ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in llama.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        expected.append(loss.item())
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_trainable_arrays_and_their_dtype(build, model, params):
    trainer, trained, _ = build(only="injected", dtypes={"param": "bfloat16", "compute": "float32"})
    state = trainer.abstract_state()
    assert set(state.trained) == set(group(params, trainer.param_specs)[0]) == set(trained)
    assert all(x.dtype == jnp.bfloat16 for x in state.trained.values())


def test_a_packed_window_has_the_loss_of_its_separate_documents(build):
    trainer, trained, frozen = build(batch_size=1)
    rng = np.random.default_rng(2)
    documents = [rng.integers(0, 72, length).astype(np.int32) for length in (5, 1, 7, 4)]
    ends = np.cumsum([len(document) for document in documents])

    def measure(tokens, segments):
        nats, count = trainer.validate(trained, frozen, tokens[None], segments[None])
        return float(nats), int(count)

    padded = [np.pad(ids, (0, 17 - len(ids)), constant_values=-1) for ids in documents]
    separate = [measure(tokens, np.zeros(17, np.int32)) for tokens in padded]
    packed = measure(np.concatenate(documents), np.searchsorted(ends, np.arange(17), side="right").astype(np.int32))
    assert packed[1] == sum(count for _, count in separate) == 17 - 4
    np.testing.assert_allclose(packed[0], sum(nats for nats, _ in separate), rtol=1e-6)


def test_the_first_token_of_a_document_is_not_a_target(build, batch):
    trainer, trained, frozen = build()
    tokens, segments = (part[0] for part in batch)
    other = tokens.copy()
    other[::2, 9] = 71 - other[::2, 9]  # the first token of the second document

    @jax.jit
    def gradients(tokens):
        return jax.grad(lambda *args: trainer._sums(*args)[0])(trained, frozen, tokens, segments[:, :10])

    # The windows end with that token, so it could only matter as a target.
    for actual, expected in zip(*(jax.tree.leaves(gradients(x[:, :10])) for x in (tokens, other)), strict=True):
        np.testing.assert_array_equal(actual, expected)
