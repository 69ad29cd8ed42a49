"""Where the arrays of a run come from: the model folder that it starts with, or its newest checkpoint."""

from collections.abc import Callable, Mapping

from tli_jax.distributed.mesh import param_sharding
from tli_jax.errors import DataError
from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.hf.load import load_arrays
from tli_jax.training.checkpoints import Checkpoints
from tli_jax.training.freezing import Arrays
from tli_jax.training.step import Programs, TrainState


def load(programs: Programs, weights: Checkpoint) -> tuple[Arrays, Arrays]:
    """Read a model folder as ``(trained, frozen)`` arrays. All processes call this; each byte is read by one of them.

    Trainable parameters are in ``param_dtype``, frozen ones in their stored dtype, or in float32 if the layers of one
    stack are stored in different dtypes.

    Raises:
        DataError: a file is shorter than its header says.
    """
    # All stacks of one tensor in a row, because the predictor of a growth while loading is trained for each tensor.
    specs = sorted(programs.param_specs, key=lambda spec: spec.tensor)
    arrays = load_arrays(
        {spec.name: weights.stack(spec.tensor, spec.layers) for spec in specs},
        {spec.name: param_sharding(programs.mesh, spec.dims) for spec in specs},
        {spec.name: programs.config.param_dtype if spec.trains else None for spec in specs},
    )
    trained, frozen = ({s.name: arrays[s.name] for s in specs if s.trains is trains} for trains in (True, False))
    return trained, frozen


def restore(
    programs: Programs, checkpoints: Checkpoints, dtypes: Mapping[str, str], report: Callable[[str], None]
) -> tuple[TrainState, Arrays] | None:
    """Read the newest intact checkpoint, on any mesh, as ``(state, frozen)``; None if there are no checkpoints.

    Args:
        dtypes: stored dtype of each frozen array by ``ParamSpec.name``.
        report: called with one line for each damaged checkpoint.

    Raises:
        DataError: all checkpoints are damaged, or the frozen tensors are damaged or missing.
    """
    newest = checkpoints.restore_newest(programs.abstract_state(), report)
    if newest is None:
        return None
    params = programs.abstract_params(lambda spec: dtypes[spec.name])
    frozen = checkpoints.restore_frozen(
        {spec.name: params[spec.name] for spec in programs.param_specs if not spec.trains}
    )
    if frozen is None:
        raise DataError(
            "checkpoints/frozen is missing: restore the run directory from a copy, or use another run directory"
        )
    return newest[1], frozen
