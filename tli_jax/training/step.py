"""One optimizer step as one jitted function over a mesh, with the shapes and shardings of everything it reads."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from tli_jax.cli.train_config import Recipe, TextConfig, TrainConfig
from tli_jax.distributed.mesh import batch_sharding, constrain, param_sharding, replicated
from tli_jax.distributed.vocabulary import sharded_cross_entropy, sharded_lookup
from tli_jax.distributed.xla_options import xla_options
from tli_jax.models.attention import AttentionImpl
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import ForwardOptions, Llama
from tli_jax.models.loss import next_tokens, summed_losses, token_losses
from tli_jax.models.moe import ExpertDispatch, every_expert
from tli_jax.training.freezing import Arrays, Layout, ParamSpec, as_model
from tli_jax.training.optimizer import GROUPS, learning_rates, make_optimizer

_SPIKE_AFTER = 20  # steps before the running mean of the gradient norm is trusted
_NORM_WEIGHT = 0.05  # of the newest gradient norm in that mean

_OF_TEXT, _OF_RECIPE, _OF_RUN = ({x.name for x in dataclasses.fields(c)} for c in (TextConfig, Recipe, TrainConfig))
# Options that the compiled functions of a run do not depend on: those about text, files and processes; those that
# determine its layout, mesh and attention; and those that only change the batches, or when it validates and saves.
UNCOMPILED = {
    *_OF_TEXT,
    *(_OF_RUN - _OF_RECIPE),
    *("verify", "isolate", "attention", "mesh", "outer", "batch_size", "sequence_length", "seed", "skip_limit"),
    *("validation_text", "validation_fraction", "validate_every", "validation_batches", "save_every"),
}


class TrainState(NamedTuple):
    """Everything that a step updates.

    Attributes:
        step: number of steps done, int32, skipped steps included; it also is the position in the data.
        trained: trainable parameters by ``ParamSpec.name``, in ``param_dtype``.
        optimizer_state: state of the optax optimizer.
        skipped: number of consecutive skipped steps, int32.
        norm: running mean of the gradient norm, float32.
    """

    step: jax.Array
    trained: Arrays
    optimizer_state: optax.OptState
    skipped: jax.Array
    norm: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """The jitted functions of a run: initialise, step, validate. ``training.trainer.Trainer`` builds on them.

    Instances that differ in ``UNCOMPILED`` options only are equal and share their jitted functions: runs of a
    comparison that differ in their seed are traced and compiled once.
    """

    model: LlamaConfig
    config: TrainConfig
    layout: Layout
    mesh: Mesh
    attention_impl: AttentionImpl
    dispatch: ExpertDispatch = every_expert
    kernel: str = "xla, within documents"  # the attention kernel, in words

    @functools.cached_property
    def _identity(self) -> tuple[Any, ...]:
        ignored = UNCOMPILED | ({"steps"} if self.config.schedule == "constant" else set())
        options = {name: value for name, value in vars(self.config).items() if name not in ignored}
        return self.model, self.layout, self.mesh, self.attention_impl, self.dispatch, repr(sorted(options.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Programs) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @functools.cached_property
    def param_specs(self) -> list[ParamSpec]:
        return self.layout.param_specs(self.model)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        return make_optimizer(self.config, self.param_specs, self.mesh)

    @property
    def forward_options(self) -> ForwardOptions:
        return ForwardOptions(
            self.config.compute_dtype,
            self.config.remat,
            self.attention_impl,
            self.dispatch,
            sharded_lookup(self.mesh),
            functools.partial(sharded_cross_entropy, self.mesh),
            functools.partial(constrain, self.mesh),
        )

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of ``tokens`` and ``segments`` in ``step``, ``[A, B, T+1]``."""
        return batch_sharding(self.mesh, ("A", "B", "T"))

    @property
    def is_head_trained(self) -> bool:
        return ("embed_tokens" if self.model.tie_word_embeddings else "lm_head") in self.layout.outer

    def flops_per_token(self, T: int) -> float:
        """FLOPs per token that a training step must do, at T tokens per sequence.

        Per matrix weight 2 for the forward pass, 2 for activation gradients at or above the lowest trainable layer, and
        2 for the weight gradient if it is trainable. Causal attention counts half, and twice that in the backward pass.
        The head counts. Embedding lookups and rematerialization do not.
        """
        per_layer = self.model.layer_matrix_params
        attention = 4 * self.model.sizes["Hh"] * T / 2
        head = self.model.vocab_size * self.model.hidden_size
        total = self.model.flops_per_token(T)
        total += (self.model.num_hidden_layers - self.layout.lowest) * (2 * per_layer + 2 * attention) + 2 * head
        total += sum(self.layout.trains) * 2 * per_layer
        return total + 2 * head * self.is_head_trained

    def abstract_params(self, dtypes: Callable[[ParamSpec], Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of every parameter by ``ParamSpec.name``."""
        return {
            spec.name: jax.ShapeDtypeStruct(
                spec.shape(self.model), dtypes(spec), sharding=param_sharding(self.mesh, spec.dims)
            )
            for spec in self.param_specs
        }

    def abstract_state(self) -> Any:
        """Shape, dtype and sharding of every array in a ``TrainState``; moments are sharded as their parameters."""
        everywhere = replicated(self.mesh)
        params = self.abstract_params(lambda spec: self.config.param_dtype)
        trained = {spec.name: params[spec.name] for spec in self.param_specs if spec.trains}

        def shard_moment(path: tuple[Any, ...], moment: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in trained]
            is_like_param = names and trained[names[-1]].shape == moment.shape
            sharding = trained[names[-1]].sharding if is_like_param else everywhere
            return jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=sharding)

        moments = jax.tree_util.tree_map_with_path(shard_moment, jax.eval_shape(self.optimizer.init, trained))
        integer = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        mean = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
        return TrainState(*cast(Any, (integer, trained, moments, integer, mean)))

    def init(self, trained: Arrays) -> TrainState:
        """The state before the first step. Donates ``trained``."""
        return _first_equal(self)._jitted_init(trained)

    @functools.cached_property
    def _jitted_init(self) -> Any:
        def make(trained: Arrays) -> TrainState:
            zero = jnp.zeros((), jnp.int32)
            return TrainState(zero, trained, self.optimizer.init(trained), zero, jnp.zeros((), jnp.float32))

        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        return jax.jit(make, out_shardings=shardings, donate_argnums=0)

    @property
    def step(self) -> Any:
        """Jitted ``(state, frozen, tokens, segments, stop) -> (state, metrics)``. Donates ``state``.

        ``tokens`` and ``segments`` are int32 ``[A, B, T+1]``, with A microbatches. ``stop`` has a flag per device: 1
        if its process was asked to stop. ``metrics["stop"]`` is 1 in every process if any flag is.
        """
        return _first_equal(self)._jitted_step

    @property
    def validate(self) -> Any:
        """Jitted ``(trained, frozen, tokens [B, T+1], segments [B, T+1]) -> (summed loss in nats, target count)``."""
        return _first_equal(self)._jitted_sums

    @property
    def token_losses(self) -> Any:
        """Jitted ``(trained, frozen, tokens [B, T+1]) -> cross-entropy of each token but the first [B, T]``, nats."""
        return _first_equal(self)._jitted_losses

    @functools.cached_property
    def _jitted_step(self) -> Any:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        return jax.jit(
            self._step,
            donate_argnums=0,
            out_shardings=(shardings, replicated(self.mesh)),
            compiler_options=xla_options(self.mesh.devices.flat[0]),
        )

    @functools.cached_property
    def _jitted_sums(self) -> Any:
        def sums(trained: Arrays, frozen: Arrays, tokens: jax.Array, segments: jax.Array) -> Any:
            return self._sums(trained, frozen, tokens, segments)[1][:2]

        return jax.jit(sums, out_shardings=replicated(self.mesh))

    @functools.cached_property
    def _jitted_losses(self) -> Any:
        def losses(trained: Arrays, frozen: Arrays, tokens: jax.Array) -> Any:
            return token_losses(self._model(trained, frozen), tokens, options=self.forward_options)[0]

        return jax.jit(losses, out_shardings=replicated(self.mesh))

    def _model(self, trained: Arrays, frozen: Arrays) -> Llama:
        return Llama.from_params(self.model, as_model(trained, frozen, self.param_specs))

    def _sums(self, trained: Arrays, frozen: Arrays, tokens: jax.Array, segments: jax.Array) -> tuple[Any, Any]:
        """``(objective, (cross-entropy, target count, load-balancing loss if the model has experts))``, all but the
        last summed over targets."""
        objective, loss, balance = summed_losses(
            self._model(trained, frozen), tokens, segments, self.config.z_loss, self.forward_options
        )
        count = jnp.sum(next_tokens(tokens, segments) >= 0)
        if not self.model.num_experts:
            return objective, (loss, count)
        return objective + self.config.balance_loss * count * balance, (loss, count, balance)

    def _cast_matrices(self, trained: Arrays) -> Arrays:
        """Cast the matrices of the layers to the compute dtype once a step: not for each microbatch and each
        rematerialization, and before they are all-gathered. Their gradients are rounded to that dtype in any case."""
        # Not the router of experts, which is computed in fp32.
        names = {spec.name for spec in self.param_specs if len(spec.dims) > 2 and spec.dims[-2] != "E"}
        return {name: x.astype(self.config.compute_dtype) if name in names else x for name, x in trained.items()}

    def _step(
        self, state: TrainState, frozen: Arrays, tokens: jax.Array, segments: jax.Array, stop: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def grad(params: Arrays, *batch: Any) -> tuple[Any, Arrays]:
            sums, gradients = jax.value_and_grad(self._sums, has_aux=True)(params, *batch)
            # Sharded before they are summed over microbatches, or the compiler may all-reduce whole gradients.
            return sums, jax.lax.with_sharding_constraint(gradients, shardings)

        shardings = {spec.name: param_sharding(self.mesh, spec.dims) for spec in self.param_specs if spec.trains}
        params = self._cast_matrices(state.trained)

        def add_microbatch(carry: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            (_, aux), gradients = grad(params, frozen, *batch)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), carry, (gradients, aux)), None

        microbatches = self.config.grad_accum_steps
        if microbatches == 1:
            (_, (loss, count, *balance)), gradients = grad(params, frozen, tokens[0], segments[0])
            gradients = {name: x.astype(state.trained[name].dtype) for name, x in gradients.items()}
        else:
            sums = (jnp.zeros(()), jnp.zeros((), jnp.int32), *([jnp.zeros(())] if self.model.num_experts else []))
            zeros = (jax.tree.map(jnp.zeros_like, state.trained), sums)
            (gradients, (loss, count, *balance)), _ = jax.lax.scan(add_microbatch, zeros, (tokens, segments))
        gradients = jax.tree.map(lambda g: g / count.astype(g.dtype), gradients)
        loss, norm = loss / count, optax.tree.norm(gradients)

        step = state.step + 1
        rates = learning_rates(self.config, step)

        def update() -> tuple[Any, ...]:
            updates, moments = self.optimizer.update(gradients, state.optimizer_state, state.trained, rates=rates)
            mean = jnp.where(state.norm == 0, norm, (1 - _NORM_WEIGHT) * state.norm + _NORM_WEIGHT * norm)
            return optax.apply_updates(state.trained, updates), moments, mean

        # A bad step changes neither parameters nor moments, only the counts. A branch, because a selection between old
        # and new arrays would read and write all of them once more.
        is_bad = ~jnp.isfinite(loss) | ~jnp.isfinite(norm)
        if self.config.spike:
            is_bad |= (state.step >= _SPIKE_AFTER) & (norm > self.config.spike * state.norm)
        before = (state.trained, state.optimizer_state, state.norm)
        trained, moments, mean = jax.lax.cond(is_bad, lambda: before, update)
        skipped = jnp.where(is_bad, state.skipped + 1, 0)
        metrics = {"loss": loss, "gradient_norm": norm, "skipped": skipped, "stop": stop.max()}
        if self.model.num_experts:
            metrics["balance"] = balance[0] / microbatches
        # Computed here because computing them while logging would wait for the device. Their order is fixed because the
        # collectives of processes with different programs deadlock.
        trainable = {group for spec in self.param_specs if spec.trains for group in spec.groups}
        metrics |= {f"learning_rate_{group}": rates[i] for i, group in enumerate(GROUPS) if group in trainable}
        return TrainState(step, trained, moments, skipped, mean), metrics


@functools.lru_cache(maxsize=32)
def _first_equal(programs: Programs) -> Programs:
    """The first of equal instances, whose jitted functions all of them use. Bounded, because programs take memory."""
    return programs
