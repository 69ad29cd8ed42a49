"""The programs that reshard what was read evenly: no device ever holds the complete array."""

import jax
import numpy as np
import pytest

from tli_jax.distributed import spread
from tli_jax.distributed.mesh import make_mesh, param_sharding
from tli_jax.distributed.spread import Spread

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@pytest.mark.parametrize(
    ("degrees", "dims", "shape"),
    [
        ({"fsdp": 8}, ("L", "F", "D"), (4, 256, 128)),
        ({"fsdp": 4, "tensor": 2}, ("L", "F", "D"), (4, 256, 128)),
        ({"fsdp": 4, "tensor": 2}, ("L", "D", "F"), (4, 128, 256)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, ("L", "F", "D"), (4, 256, 128)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, ("L", "F", "D"), (4, 246, 128)),  # padded
        ({"fsdp": 2, "expert": 2, "tensor": 2}, ("L", "E", "F", "D"), (4, 4, 256, 128)),
        ({"fsdp": 4, "expert": 2}, ("L", "F", "D"), (4, 256, 128)),
    ],
)
def test_resharding_takes_the_memory_of_a_few_shards(degrees, dims, shape):
    plan = Spread(param_sharding(make_mesh(degrees), dims), shape, len(dims) - 2)
    abstract = jax.ShapeDtypeStruct(plan.read_shape, np.float32, sharding=plan.read_sharding)
    memory = spread._reshard((plan,)).lower([abstract]).compile().memory_analysis()
    shard = 4 * np.prod(plan.sharding.shard_shape(shape))
    assert memory.output_size_in_bytes < 1.01 * shard  # with the pointers of a tuple
    assert memory.temp_size_in_bytes < 2.2 * shard
    assert shard < 4 * np.prod(shape) / 3
