"""inject: reference values, any pytree, transformations, and sharded arrays."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tli_jax.errors import UsageError
from tli_jax.growth.custom import custom
from tli_jax.growth.inject import inject
from tli_jax.growth.methods import average, dus, interpose, llama_pro, slayer, stack, tli
from tli_jax.growth.plan import Plan
from tli_jax.growth.rows import Row
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import Llama, init_params
from tli_jax.models.modules import Linear

DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
CONFIG = LlamaConfig(32, 16, 24, 4, 4, 2, 4)

# A plan with every kind of row: kept and injected, linear and computed.
KINDS = [
    Row(((0, 1.0),)),
    Row(((0, 1.0),), 0.0, "identity", True, 1),
    Row(((1, 1.0),), 0.5),
    Row(((1, 1.0),), 0.5, "half", True, 1),
    Row(((2, 1.0),)),
    Row(((2, 0.5), (3, 0.5)), 1.0, "average", True, 1),
    Row(((3, 1.0),)),
    Row(((3, 0.5), (0, 0.5)), 0.0, "average_identity", True, 1),
    Row(((3, 1.0),), 0.5, "noise", True, 1),
    Row(((3, 1.0),), 1.0, "random", True, 1),
    Row(((3, 1.0),), 0.3, "scaled", True, 1),
]
ALL_KINDS = Plan("all kinds", 4, tuple(KINDS), {"seed": 3, "noise_ratio": 0.1, "std": 0.02})
LINEAR_KINDS = Plan("linear kinds", 4, tuple(row for row in KINDS if row.init not in ("noise", "random")))


def make_tree(layers: int, dtype: Any = np.float32, rows: int = 8, columns: int = 16) -> dict[str, Any]:
    """An artificial model with biases, leaves of any shape outside the layers, and no value below 2**-8."""
    rng = np.random.default_rng(layers)

    def leaf(*shape: int) -> np.ndarray:
        values = rng.uniform(2**-8, 1, shape) * rng.choice([-1, 1], shape)
        return values.astype(np.float32).astype(dtype)

    return {
        "embed": leaf(columns, rows),
        "layers": {
            "mixer": {
                "q_proj": {"weight": leaf(layers, columns, rows), "bias": leaf(layers, columns)},
                "o_proj": {"weight": leaf(layers, rows, columns), "bias": leaf(layers, rows)},
            },
            "down_proj": leaf(layers, rows, columns),
            "norm": {"weight": leaf(layers, rows)},
            "gate": leaf(layers),
        },
        "scale": leaf(),
        "head": [leaf(1, 2, 3, 4), leaf(layers + 1)],
    }


def flatten(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def is_output(name: str) -> bool:
    return "o_proj" in name or "down_proj" in name


def expected_layer(init: str, leaf: np.ndarray, layer: int, name: str) -> np.ndarray:
    """An injected layer by its definition, in fp32, rounded once."""
    before, after = (leaf[min(i, len(leaf) - 1)].astype(np.float32) for i in (layer, layer + 1))
    value = (before + after) / 2 if "average" in init else after if "next" in init else before
    if is_output(name):
        factors = {"scaled": np.float32(0.3), "half": 0.5}
        value = value * (0 if "identity" in init else factors.get(init, 1))
    return np.asarray(value + np.float32(0)).astype(leaf.dtype)  # + 0: a zero is never negative


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("init", ["copy", "identity", "scaled", "half", "average", "average_identity", "next_identity"])
def test_values(init: str, dtype: np.dtype):
    base = flatten(make_tree(5, dtype))
    plan = tli(5, 2, init, scale=0.3 if init == "scaled" else None)
    grown = flatten(jax.jit(inject, static_argnums=1)(make_tree(5, dtype), plan))
    assert grown.keys() == base.keys()
    for name, leaf in base.items():
        if "layers" not in name:
            assert grown[name].tobytes() == leaf.tobytes()
            continue
        assert (grown[name].dtype, grown[name].shape) == (dtype, (7, *leaf.shape[1:]))
        for number, source in enumerate([0, 1, 1, 2, 3, 3, 4]):
            want = leaf[source]
            if plan.injected[number]:
                want = expected_layer(init, leaf, source, name)
            elif init == "half" and source in (1, 3) and is_output(name):
                want = (want.astype(np.float32) / 2).astype(dtype)
            assert grown[name][number].tobytes() == want.tobytes(), (name, number)


@pytest.mark.parametrize(
    "plan",
    [dus(5, 1), stack(5), interpose(5), llama_pro(5, 5), slayer(5), average(5, 5), custom(5, "4,0-2,2*0,1*0.25")],
    ids=lambda plan: plan.method,
)
def test_values_of_methods(plan: Plan):
    base, grown = flatten(make_tree(5)), flatten(inject(make_tree(5), plan))
    for name, leaf in base.items():
        if "layers" in name:
            for number, row in enumerate(plan.rows):
                mean = sum(leaf[layer] for layer, _ in row.sources) / len(row.sources)
                want = mean * np.float32(row.scale if is_output(name) else 1)
                np.testing.assert_array_equal(grown[name][number], want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeroed_outputs_are_plus_zero_and_biases_are_zeroed_too(dtype: np.dtype):
    tree = make_tree(3, dtype)
    tree["layers"]["down_proj"] = np.full((3, 8, 16), -0.0, dtype)
    tree["layers"]["mixer"]["o_proj"]["bias"] = np.full((3, 8), -np.inf, dtype)  # 0 * inf would be NaN
    grown = inject(tree, tli(3, 1))["layers"]
    for leaf in (grown["down_proj"], grown["mixer"]["o_proj"]["weight"], grown["mixer"]["o_proj"]["bias"]):
        injected = np.asarray(leaf)[1::2]
        assert injected.tobytes() == bytes(injected.nbytes)
    kept = np.asarray(grown["down_proj"])[::2]
    assert np.signbit(kept.astype(np.float32)).all()
    assert np.asarray(grown["mixer"]["q_proj"]["bias"])[1::2].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_has_the_given_ratio(dtype: np.dtype):
    tree = {"layers": {"o_proj": {"weight": make_tree(2, dtype, 64, 128)["layers"]["down_proj"]}}}
    source = tree["layers"]["o_proj"]["weight"].astype(np.float32)

    def grow(**options: Any) -> np.ndarray:
        plan = tli(2, 1, "noise", **options)
        return np.asarray(inject(tree, plan)["layers"]["o_proj"]["weight"]).astype(np.float32)

    grown = grow(noise_ratio=0.1)
    np.testing.assert_array_equal(grown[::2], source)
    for layer in range(2):
        added, rms = grown[2 * layer + 1] - source[layer], np.sqrt(np.square(source[layer]).mean())
        assert added.std() / rms == pytest.approx(0.1, rel=0.03)
        assert abs(added.mean()) < 0.01 * rms
    # The random key depends on seed, row and name.
    assert np.abs(np.corrcoef((grown[1] - source[0]).ravel(), (grown[3] - source[1]).ravel())[0, 1]) < 0.05
    np.testing.assert_array_equal(grow(noise_ratio=0.1), grown)
    assert (grow(noise_ratio=0.1, seed=1)[1] != grown[1]).mean() > 0.9
    np.testing.assert_array_equal(grow(noise_ratio=0.0)[1::2], source)
    np.testing.assert_allclose(grow(noise_ratio=0.1, scale=0.5)[1::2], grown[1::2] / 2, rtol=1e-2, atol=1e-6)
    assert not grow(noise_ratio=0.1, scale=0.0)[1::2].any()


def test_random_is_a_new_initialisation():
    tree = make_tree(2, np.float32, 64, 128)
    del tree["layers"]["gate"], tree["layers"]["mixer"]["o_proj"]["bias"]
    grown = inject(tree, tli(2, 1, "random", std=0.05, scale=0.5))["layers"]
    q, o = (np.asarray(grown["mixer"][name]["weight"]) for name in ("q_proj", "o_proj"))
    assert q[1].std() == pytest.approx(0.05, rel=0.03) and o[1].std() == pytest.approx(0.025, rel=0.03)
    assert (np.asarray(grown["norm"]["weight"])[1::2] == 1).all()
    assert not np.asarray(grown["mixer"]["q_proj"]["bias"])[1::2].any()
    # Rows and tensors have independent values.
    samples = [q[1].ravel(), q[3].ravel(), o[1].ravel(), np.asarray(grown["down_proj"])[1].ravel()]
    assert np.abs(np.corrcoef(samples) - np.eye(4)).max() < 0.05


def test_modules_and_states():
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), shapes)
    grow = jax.jit(lambda tree: inject(tree, tli(4, 2, "half")))
    model = Llama.from_params(CONFIG, params)
    state = nnx.state(model)
    grown, of_state, of_dict = grow(model), grow(state), grow(params)
    assert isinstance(grown, Llama) and isinstance(grown.layers.mlp.down_proj.weight, nnx.Param)
    assert grown.layers.mlp.down_proj.weight.shape == (6, 16, 24)
    assert jax.eval_shape(lambda model: model(jnp.zeros((2, 8), int)), grown).shape == (2, 8, CONFIG.vocab_size)
    for tree in (grown, of_state):
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(Llama.from_params(CONFIG, of_dict)), strict=True):
            np.testing.assert_array_equal(a, b)
    # The random key of computed rows depends on the tensor's name, which excludes a variable's "value".
    linear = Linear(16, 16, stack=(4,), rngs=nnx.Rngs(0))
    weight = linear.weight[...]
    of_module = inject({"layers": {"q_proj": linear}}, tli(4, 4, "noise"))["layers"]["q_proj"].weight[...]
    of_dict = inject({"layers": {"q_proj": {"weight": weight}}}, tli(4, 4, "noise"))["layers"]["q_proj"]["weight"]
    np.testing.assert_array_equal(of_module, of_dict)
    assert (of_module[4] != of_module[3]).any()


def test_other_names():
    tree = {"trunk": {"blocks": {"c_proj": {"w": np.ones((2, 3))}, "o_proj": np.ones((2, 3))}}, "layers": np.ones(7)}
    grown = inject(tree, tli(2, 2), layers="blocks", outputs=("c_proj",))
    np.testing.assert_array_equal(grown["trunk"]["blocks"]["c_proj"]["w"], [[1, 1, 1], [1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(grown["trunk"]["blocks"]["o_proj"], np.ones((3, 3)))
    assert grown["layers"] is tree["layers"]
    everything = inject(tree, tli(2, 2), layers="blocks", outputs=())
    np.testing.assert_array_equal(everything["trunk"]["blocks"]["c_proj"]["w"], np.ones((3, 3)))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"blocks": np.ones((4, 2))}, "no subtree 'layers'"),
        ({}, "no subtree 'layers'"),
        ({"layers": {"q": np.ones((5, 2))}}, r"layers\.q has shape \(5, 2\), but the plan is for 4"),
        ({"layers": {"q": np.ones((4, 2)), "k": np.ones(3)}}, r"layers\.k has shape \(3,\)"),
        ({"layers": {"q": np.float32(1)}}, r"layers\.q has shape \(\)"),
    ],
)
def test_params_of_another_depth_are_refused(tree: Any, message: str):
    with pytest.raises(UsageError, match=message):
        inject(tree, tli(4, 2))
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(lambda: inject(tree, tli(4, 2)))


@pytest.mark.parametrize(
    ("plan", "dtype"), [(ALL_KINDS, DTYPES[0]), (LINEAR_KINDS, DTYPES[1])], ids=["all-float32", "linear-bfloat16"]
)
def test_jit_and_eval_shape_agree_with_the_plain_call(plan: Plan, dtype: np.dtype):
    tree = make_tree(4, dtype)
    if plan is ALL_KINDS:  # each computed tensor is a program of its own
        tree["layers"] = tree["layers"]["mixer"]["o_proj"]
    plain = flatten(inject(tree, plan))
    compiled = flatten(jax.jit(lambda tree: inject(tree, plan))(tree))
    shapes = jax.eval_shape(lambda tree: inject(tree, plan), tree)
    shapes = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    for name, leaf in plain.items():
        assert (shapes[name].shape, shapes[name].dtype) == (leaf.shape, leaf.dtype)
        assert_same_layers(compiled[name], leaf, plan if "layers" in name else None)


def assert_same_layers(a: np.ndarray, b: np.ndarray, plan: Plan | None) -> None:
    """Equal byte for byte; computed layers to an ulp."""
    computed = [number for number, row in enumerate(plan.rows if plan else ()) if row.init in ("noise", "random")]
    linear = [number for number in range(len(plan)) if number not in computed] if plan else ...
    assert a[linear].tobytes() == b[linear].tobytes()
    if computed:
        assert_within_an_ulp(a[computed], b[computed])


def assert_within_an_ulp(a: np.ndarray, b: np.ndarray) -> None:
    """An ulp of the largest value, because a sum that cancels is as uncertain as its terms."""
    largest = float(np.abs(b.astype(np.float32)).max())
    ulp = largest * float(ml_dtypes.finfo(b.dtype).eps)
    np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=0, atol=ulp)


@pytest.mark.parametrize("plan", [LINEAR_KINDS, dus(4, 1), custom(4, "0,0,3")], ids=lambda plan: plan.method)
def test_the_gradient_is_the_transpose(plan: Plan):
    """The gradient of a base layer is the weighted sum of the gradients of all layers built from it."""
    tree, draw = make_tree(4), np.random.default_rng(0)
    grown = jax.eval_shape(lambda: inject(tree, plan))
    upstream = {
        jax.tree_util.keystr(path): draw.integers(-8, 8, leaf.shape).astype(np.float32)
        for path, leaf in jax.tree_util.tree_leaves_with_path(grown)
    }

    @jax.grad
    def inner_product(tree: Any) -> jax.Array:
        leaves = jax.tree_util.tree_leaves_with_path(inject(tree, plan))
        return sum(jnp.vdot(leaf, upstream[jax.tree_util.keystr(path)]) for path, leaf in leaves)

    for name, gradient in flatten(jax.jit(inner_product)(tree)).items():
        if "layers" not in name:
            np.testing.assert_array_equal(gradient, upstream[name])
            continue
        expected = np.zeros_like(gradient)
        for number, row in enumerate(plan.rows):
            for layer, weight in row.sources:
                expected[layer] += np.float32(weight * (row.scale if is_output(name) else 1)) * upstream[name][number]
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("plan", "expected"), [(tli(2, 1, "noise", noise_ratio=0.0), 2), (tli(2, 1, "random"), 1)])
def test_the_gradient_of_computed_rows(plan: Plan, expected: int):
    # Noise passes the gradient to its source, a random layer to nothing.
    gradient = jax.grad(lambda leaf: jnp.sum(inject({"layers": leaf}, plan)["layers"]))(
        make_tree(2)["layers"]["down_proj"]
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@settings(max_examples=15)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_one_composed_step_equals_two(data: st.DataObject, dtype: np.dtype):
    def draw_plan(layers: int) -> Plan:
        every = data.draw(st.integers(1, layers))
        inits = st.sampled_from(["copy", "identity", "half"])
        kinds = [lambda: tli(layers, every, data.draw(inits)), lambda: dus(layers, every - 1), lambda: stack(layers)]
        return data.draw(st.sampled_from(kinds))()

    first = draw_plan(data.draw(st.integers(1, 4)))
    second = draw_plan(len(first))
    both = second.compose(first)
    leaf = make_tree(first.base_layers, dtype, 2, 3)["layers"]["down_proj"]
    tree = {"layers": {"o_proj": leaf, "q_proj": leaf}}
    once, twice = flatten(inject(tree, both)), flatten(inject(inject(tree, first), second))
    assert {name: leaf.tobytes() for name, leaf in once.items()} == {n: leaf.tobytes() for n, leaf in twice.items()}


@jax.jit
def grow_all_kinds(tree: Any) -> Any:
    return inject(tree, ALL_KINDS)


# The mesh axes of each dim, by letter.
SPECS = {
    "embed": ("bc", "a"),
    "q_proj": ("", "bc", "a"),
    "o_proj": ("", "a", "bc"),
}


def make_mesh(*sizes: int) -> jax.sharding.Mesh:
    axes = ("a", "b", "c")[: len(sizes)]
    return jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(sizes))


def sharded_tree(mesh: jax.sharding.Mesh, dtype: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A tree on the host, its shardings, and the sharded tree."""
    tree = make_tree(4, dtype, 16, 48)
    tree = {"embed": tree["embed"], "layers": tree["layers"]["mixer"]}
    del tree["layers"]["q_proj"]["bias"]

    def place(path: Any, leaf: np.ndarray) -> NamedSharding:
        spec = next(SPECS[key.key] for key in reversed(path) if key.key in SPECS)
        # A third axis shares a dim with the second. Axes that the mesh does not have are left out.
        axes = [tuple(name for name in axis if name in mesh.axis_names) for axis in spec[: leaf.ndim]]
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = jax.tree_util.tree_map_with_path(place, tree)
    return tree, shardings, jax.device_put(tree, shardings)


def assert_no_leaf_is_gathered(program: str, whole: set[tuple[int, ...]], largest: int) -> None:
    """Check every instruction of a compiled, partitioned program.

    Args:
        whole: shapes of unsharded leaves, which must not occur.
        largest: number of elements of the largest array that a device may hold.
    """
    moved = re.findall(
        r"\b(all-gather|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all)[\w-]*\(", program
    )
    assert not moved
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[(\d[\d,]*)\]", program)}
    assert shapes and not shapes & whole
    assert max(map(np.prod, shapes)) <= largest


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("sizes", "dtype", "asked"),
    [
        ((8,), np.float32, True),
        ((2, 4), ml_dtypes.bfloat16, False),
        ((4, 2), np.float32, False),
        ((2, 2, 2), np.float32, True),
    ],
    ids=str,
)
def test_sharded(sizes: tuple[int, ...], dtype: Any, asked: bool):
    tree, shardings, placed = sharded_tree(make_mesh(*sizes), dtype)
    jitted = jax.jit(grow_all_kinds, out_shardings=shardings if asked else None)
    compiled = jitted.lower(placed).compile()
    grown = compiled(placed)

    def check(leaf: jax.Array, sharding: NamedSharding) -> None:
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert {shard.data.shape for shard in leaf.addressable_shards} == {sharding.shard_shape(leaf.shape)}

    jax.tree.map(check, grown, shardings)
    alone, spread = flatten(grow_all_kinds(tree)), flatten(grown)
    for name, leaf in alone.items():
        assert_same_layers(spread[name], leaf, ALL_KINDS if "layers" in name else None)

    whole = {leaf.shape for leaf in (*jax.tree.leaves(tree), *alone.values()) if leaf.ndim > 2}
    local = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(grown)]
    assert_no_leaf_is_gathered(compiled.as_text(), whole, max(leaf.size for leaf in local))
    assert compiled.memory_analysis().output_size_in_bytes <= sum(leaf.nbytes for leaf in local) + 64 * len(local)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_sharded_without_jit():
    tree, shardings, placed = sharded_tree(make_mesh(2, 4), np.float32)
    plan = tli(4, 2, "half")
    grown = inject(placed, plan)
    assert all(
        leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        for leaf, sharding in zip(jax.tree.leaves(grown), jax.tree.leaves(shardings), strict=True)
    )
    alone = flatten(inject(tree, plan))
    assert all(leaf.tobytes() == alone[name].tobytes() for name, leaf in flatten(grown).items())


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("init", ["identity", "half", "average"])
def test_an_8b_model_grows_within_each_devices_shard(init: str):
    """Llama-3.1-8B, 32 → 40 layers in bf16, compiled ahead of time without weights, to read the memory analysis."""
    config = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128)
    mesh = make_mesh(2, 4)
    axes = {"D": "a", "F": "b", "Hh": "b", "Kh": "b", "V": "b"}

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = ".".join(key.key for key in path)
        dims = config.layer_tensors[name[7:]] if name.startswith("layers.") else config.outer_tensors[name]
        spec = [axes[dim] for dim in dims] if len(dims) == 2 else [("a", "b")]
        spec = PartitionSpec(*([None] * (leaf.ndim - len(dims))), *spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), jnp.bfloat16))
    base = jax.tree_util.tree_map_with_path(place, shapes)
    grow: Callable[[Any], Any] = lambda params: inject(params, tli(32, 4, init))  # noqa: E731
    compiled = jax.jit(grow).lower(base).compile()
    grown = jax.eval_shape(grow, base)
    total = sum(leaf.size * 2 for leaf in jax.tree.leaves(grown))
    assert total == 2 * config.with_layers(40).num_params
    memory = compiled.memory_analysis()
    # Each device holds an eighth, and a table of pointers to its 12 arrays.
    assert 0 <= memory.output_size_in_bytes - total // 8 <= 16 * len(jax.tree.leaves(grown))
    assert memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes < 0.6 * total
    leaves = [*jax.tree.leaves(base), *jax.tree.leaves(grown)]
    assert_no_leaf_is_gathered(
        compiled.as_text(),
        {leaf.shape for leaf in leaves if len(leaf.shape) > 1},
        max(leaf.size for leaf in leaves) // 8,
    )
    same = zip(jax.tree.leaves(compiled.output_shardings), jax.tree.leaves(base), strict=True)
    assert all(sharding.is_equivalent_to(leaf.sharding, len(leaf.shape)) for sharding, leaf in same)
