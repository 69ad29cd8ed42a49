"""Grow a model while it is loaded: no grown copy is written, and no proof is run."""

from tli_jax.cli.console import warn
from tli_jax.cli.growth_options import GrowthOptions
from tli_jax.distributed import processes
from tli_jax.errors import UsageError
from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.hf.grown_checkpoint import GrownCheckpoint, grow_checkpoint
from tli_jax.upscaling.options import make_plan, needs_importance
from tli_jax.upscaling.positions import find_harm
from tli_jax.upscaling.record import describe_growth

NOT_PROVED = "grown while loading, which runs no proof: tli-jax upscale does"


def grow_while_loading(options: GrowthOptions, base: Checkpoint, model: str) -> GrownCheckpoint:
    """Open a base as the model that ``tli-jax upscale`` would make of it.

    The record has no digests and counts no NaN or Inf, because both take another pass over the weights.

    Args:
        model: name of the base, if it does not come from the Hub.

    Raises:
        UsageError: an option does not apply, see ``make_plan``, or the method needs a text.
    """
    if needs_importance(options):
        raise UsageError(
            "grow: method adept measures the layers on a text: grow with tli-jax upscale, or give --grow.after"
        )
    plan = make_plan(options, base)
    if processes.is_first() and (harm := find_harm(options, plan)) is not None:
        warn(harm)
    record = describe_growth(base, plan, model) | {"digests": None, "proof": None, "not_proved": NOT_PROVED}
    return grow_checkpoint(base, plan, record)
