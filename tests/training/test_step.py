"""One step: the same on every mesh, with no more work than needed, the same as torch's, harmless if it goes wrong."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tli_jax.distributed.mesh import batch_sharding, replicated
from tli_jax.hf.save import save_hf
from tli_jax.training.freezing import group

MESHES = {"8x1": {"fsdp": 8}, "4x2": {"data": 4, "fsdp": 2}}
MESHES |= {"2x2x2": {"data": 2, "fsdp": 2, "tensor": 2}}


def place(trainer, batch):
    return tuple(jax.device_put(x, trainer.batch_sharding) for x in batch)


def stop(trainer):
    return jax.device_put(np.zeros(trainer.mesh.size, np.int32), batch_sharding(trainer.mesh, ("B",)))


def train(trainer, trained, frozen, batches):
    """Losses of some steps, and the state after."""
    state, losses = trainer.init(trained), []
    for batch in batches:
        state, measured = trainer.step(state, frozen, *place(trainer, batch), stop(trainer))
        losses.append(float(measured["loss"]))
    return losses, state


def train_with_gradients(trainer, trained, frozen, batch):
    """Losses of three steps, the first one's gradients (Adam's first moment, but for a factor), the program."""
    state = trainer.init(trained)
    arguments = (frozen, *place(trainer, batch), stop(trainer))
    program = trainer.step.lower(state, *arguments).compile()
    losses, gradients = [], {}
    for _ in range(3):
        state, measured = program(state, *arguments)
        losses.append(float(measured["loss"]))
        # Fetched before the state is donated.
        gradients = gradients or {n: np.asarray(x) for n, x in optax.tree.get(state.optimizer_state, "mu").items()}
    return losses, gradients, program.as_text()


@pytest.fixture(scope="module")
def on_one_device(start, batch):
    """Gradients, and losses of three steps, of what trains under an option."""
    found = {}

    def of(only):
        if only not in found:
            found[only] = train_with_gradients(*start(only=only, learning_rate=1e-2, clip_norm=0), batch)
        return found[only]

    return of


def check_gradients(found, expected):
    for name, gradient in found.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("only", ["all", "injected"])
def test_every_mesh_gives_the_same_and_brings_no_stack_together(start, batch, on_one_device, mesh, only):
    trainer = start(MESHES[mesh], only=only, learning_rate=1e-2, clip_norm=0)
    (losses, gradients, text), (expected, of_expected, _) = train_with_gradients(*trainer, batch), on_one_device(only)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    check_gradients(gradients, of_expected)
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
    shapes = [tuple(map(int, dims.split(","))) for dims in gathered if dims]
    assert shapes, "a sharded model has to bring something together"
    # One layer's matrix at a time, the largest of which is F x D; embedding and head, with V in them, are no stacks.
    assert max(np.prod(shape) for shape in shapes if not {72, 36} & set(shape)) <= 56 * 40


def count_flops(jaxpr) -> int:
    """2 a multiply-add of every matrix product, scans unrolled."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            inner = np.prod([eqn.invars[0].aval.shape[i] for i in contracting])
            total += 2 * int(inner) * int(np.prod(eqn.outvars[0].aval.shape))
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in _inner(eqn):
            total += times * count_flops(inner)
    return total


def _inner(eqn):
    for value in eqn.params.values():
        for part in value if isinstance(value, list | tuple) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


@pytest.mark.parametrize("outer", [None, "all"])
@pytest.mark.parametrize("only", ["all", "injected", "last_n(3)", "layers(0,6)"])
def test_a_step_does_the_flops_that_are_stated_and_no_more(start, only, outer):
    trainer, trained, frozen = start(only=only, outer=outer, remat="none")
    B, T = 8, 16
    tokens = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
    # The chunked loss runs the head again in its backward pass, for memory, which is not counted.
    again = 2 * trainer.model.vocab_size * trainer.model.hidden_size
    jaxpr = jax.make_jaxpr(jax.grad(lambda *a: trainer._sums(*a)[0]))(trained, frozen, tokens, tokens)
    # The statement counts causal attention half; this kernel does all of it, as at twice the context.
    assert count_flops(jaxpr.jaxpr) == B * T * (trainer.flops_per_token(2 * T) + again)


def test_parts_of_a_batch_give_the_step_of_the_whole(start, batch):
    rng = np.random.default_rng(3)
    batches = [tuple(np.asarray(rng.permutation(x.swapaxes(0, 1)).swapaxes(0, 1)) for x in batch) for _ in range(3)]
    trainer, trained, frozen = start(only="injected", learning_rate=1e-2, auxiliary={"z": 1e-3})
    whole, _ = train(trainer, trained, frozen, batches)
    trainer, trained, frozen = start(only="injected", learning_rate=1e-2, auxiliary={"z": 1e-3}, grad_accum_steps=4)
    parts, _ = train(trainer, trained, frozen, [tuple(x.reshape(4, 2, 17) for x in b) for b in batches])
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_documents_in_a_window_do_not_see_each_other(start, batch):
    trainer, trained, frozen = start()
    tokens, segments = (x[0] for x in batch)
    other = tokens.copy()
    other[:, :5] = (other[:, :5] + 1) % 72  # within the first document

    def losses(tokens, segments):
        from tli_jax.models.llama import Llama
        from tli_jax.models.loss import token_losses
        from tli_jax.training.freezing import as_model

        llama = Llama.from_params(trainer.model, as_model(trained, frozen, trainer.param_specs))
        return np.asarray(token_losses(llama, jnp.asarray(tokens), segments_BT=jnp.asarray(segments))[0])

    same = losses(tokens, segments) == losses(other, segments)
    assert same[::2, 9:].all()  # targets whose inputs are all in the second document
    assert not same[1::2, 9:].any()  # one document: everything after changes


def test_padding_counts_for_nothing(start, batch):
    trainer, trained, frozen = start()
    tokens, segments = (x[0] for x in batch)
    loss, count = trainer.validate(trained, frozen, tokens[:4], segments[:4])
    padded, of_padded = trainer.validate(trained, frozen, np.where(np.arange(8)[:, None] < 4, tokens, -1), segments)
    assert int(count) == int(of_padded) == 4 * 16 - 2  # the first tokens of two documents are no targets
    np.testing.assert_allclose(padded, loss, rtol=1e-6)


def test_z_loss_is_the_squared_log_of_the_denominator(start, batch):
    trainer, trained, frozen = start(auxiliary={"z": 1e-2})
    tokens, segments = (x[0] for x in batch)
    total, (loss, _) = trainer._sums(trained, frozen, tokens, segments)
    from tli_jax.models.llama import Llama
    from tli_jax.training.freezing import as_model

    llama = Llama.from_params(trainer.model, as_model(trained, frozen, trainer.param_specs))
    hidden, _, _ = llama.hidden(tokens[:, :-1], segments_BT=segments[:, :-1])
    log_z = jax.nn.logsumexp(llama.head(hidden), axis=-1) * (segments[:, 1:] == segments[:, :-1])
    np.testing.assert_allclose(total - loss, 1e-2 * jnp.square(log_z).sum(), rtol=1e-4)


@pytest.mark.parametrize(("remat", "only"), [("none", "injected"), ("dots", "all")])
def test_what_is_computed_again_is_the_same(start, batch, on_one_device, remat, only):
    trainer = start(only=only, remat=remat, learning_rate=1e-2, clip_norm=0)
    check_gradients(train_with_gradients(*trainer, batch)[1], on_one_device(only)[1])


def test_frozen_tensors_keep_their_dtype_and_compute_is_in_another(start, batch):
    trainer, trained, frozen = start(only="injected", dtypes={"compute": "bfloat16"}, learning_rate=1e-2)
    frozen = {name: x.astype(jnp.bfloat16) for name, x in frozen.items()}
    losses, state = train(trainer, trained, frozen, [batch] * 8)
    assert losses[-1] < losses[0] - 0.1
    assert {x.dtype for x in state.trained.values()} == {np.dtype("float32")}


class TestBadSteps:
    """A step that is not finite, or whose gradient is a spike, changes nothing but the count of bad ones."""

    def test_not_finite(self, start, batch):
        trainer, trained, frozen = start(learning_rate=1e-2)
        broken = trained | {"norm.weight": trained["norm.weight"].at[3].set(jnp.nan)}
        before = {name: np.asarray(x) for name, x in broken.items()}
        _, state = train(trainer, broken, frozen, [batch] * 2)
        assert (int(state.step), int(state.skipped)) == (2, 2)
        jax.tree.map(np.testing.assert_array_equal, state.trained, before)
        assert all(not np.asarray(x).any() for x in jax.tree.leaves(state.optimizer_state))

    def test_spike(self, start, batch):
        trainer, trained, frozen = start(only="injected", spike=3.0, learning_rate=1e-3)
        losses, state = train(trainer, trained, frozen, [batch] * 21)
        assert int(state.skipped) == 0 and losses[-1] < losses[0]
        # As if the batch had been far larger: the running mean makes it a spike.
        state = state._replace(norm=jax.device_put(state.norm / 100, replicated(trainer.mesh)))
        before = {name: np.asarray(x) for name, x in state.trained.items()}
        state, measured = trainer.step(state, frozen, *place(trainer, batch), stop(trainer))
        assert int(measured["skipped"]) == 1
        jax.tree.map(np.testing.assert_array_equal, state.trained, before)
        # And the first good one puts the count back.
        state = state._replace(norm=jax.device_put(state.norm * 100, replicated(trainer.mesh)))
        state, measured = trainer.step(state, frozen, *place(trainer, batch), stop(trainer))
        assert int(measured["skipped"]) == 0
        assert any((np.asarray(x) != before[name]).any() for name, x in state.trained.items())


@pytest.mark.parametrize("only", ["all", "injected"])
def test_ten_steps_of_adamw_are_torch_s(model, params, start, tmp_path, only):
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
    trainer, trained, frozen = start(only=only, schedule="constant", remat="full", **options)
    ours, _ = train(trainer, trained, frozen, [(tokens, np.zeros_like(tokens)) for tokens in batches])

    save_hf(tmp_path / "model", model, params)
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    trains = {f".{layer}." for leaf in trainer.param_specs if leaf.trains for layer in leaf.layers}
    decayed, others = [], []
    for name, parameter in llama.named_parameters():
        in_layer = re.search(r"\.\d+\.", name)
        parameter.requires_grad = in_layer[0] in trains if in_layer else only == "all"
        is_decayed = parameter.ndim == 2 and "embed" not in name
        (decayed if is_decayed else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    theirs = []
    for tokens in batches:
        ids = torch.tensor(tokens[0], dtype=torch.long)
        logits = llama(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 72), ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in llama.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        theirs.append(loss.item())
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_group_and_dtype_of_every_leaf(start, model, params):
    trainer, trained, _ = start(only="injected", dtypes={"param": "bfloat16", "compute": "float32"})
    state = trainer.abstract_state()
    assert set(state.trained) == set(group(params, trainer.param_specs)[0]) == set(trained)
    assert all(x.dtype == jnp.bfloat16 for x in state.trained.values())


def test_a_packed_window_has_the_loss_of_its_documents_one_by_one(start):
    trainer, trained, frozen = start(batch_size=1)
    draw = np.random.default_rng(2)
    documents = [draw.integers(0, 72, length).astype(np.int32) for length in (5, 1, 7, 4)]
    ends = np.cumsum([len(document) for document in documents])

    def measure(tokens, segments):
        nats, count = trainer.validate(trained, frozen, tokens[None], segments[None])
        return float(nats), int(count)

    alone = [measure(np.pad(one, (0, 17 - len(one)), constant_values=-1), np.zeros(17, np.int32)) for one in documents]
    packed = measure(np.concatenate(documents), np.searchsorted(ends, np.arange(17), side="right").astype(np.int32))
    assert packed[1] == sum(count for _, count in alone) == 17 - 4
    np.testing.assert_allclose(packed[0], sum(nats for nats, _ in alone), rtol=1e-6)


def test_a_target_across_documents_gives_no_gradient(start, batch):
    trainer, trained, frozen = start()
    tokens, segments = (part[0] for part in batch)
    other = tokens.copy()
    other[::2, 9] = 71 - other[::2, 9]  # the first token of a second document is an input still

    def of_the_token_before(tokens):
        # Up to that token: what it predicts can matter to nothing else.
        return jax.grad(lambda *args: trainer._sums(*args)[0])(trained, frozen, tokens[:, :10], segments[:, :10])

    for one, two in zip(*(jax.tree.leaves(of_the_token_before(x)) for x in (tokens, other)), strict=True):
        np.testing.assert_array_equal(one, two)
