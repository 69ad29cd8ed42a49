"""One optimizer step as one jitted function over a mesh, and what it needs to start: state, shardings, FLOPs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tli_jax.cli.config import TrainConfig
from tli_jax.cli.values import Group
from tli_jax.distributed.mesh import batch_sharding, constrain, param_sharding, replicated
from tli_jax.models.attention import AttentionImpl
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import ForwardOptions, Llama
from tli_jax.models.loss import LOGITS, next_tokens, token_losses
from tli_jax.models.moe import ExpertDispatch, every_expert
from tli_jax.training.freezing import Arrays, Layout, ParamSpec, as_model
from tli_jax.training.optimizer import GROUPS, make_optimizer, make_schedule

# Steps before which a gradient is not called a spike, and the weight of the newest in the running mean of its norm.
_SPIKE_AFTER = 20
_NORM_WEIGHT = 0.05


class TrainState(NamedTuple):
    """All that a step changes.

    Args:
        step: steps done, skipped ones included; so the data position too.
        trained: the parameters that train, by the names of their leaves, in ``param_dtype``.
        optimizer_state: the state of the optimizer.
        skipped: bad steps in a row.
        norm: running mean of the gradient's norm.
    """

    step: jax.Array
    trained: Arrays
    optimizer_state: optax.OptState
    skipped: jax.Array
    norm: jax.Array


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The programs of one run, and the abstract description of all that goes in and out."""

    model: LlamaConfig
    config: TrainConfig
    layout: Layout
    mesh: Mesh
    attention_impl: AttentionImpl
    dispatch: ExpertDispatch = every_expert

    @functools.cached_property
    def param_specs(self) -> list[ParamSpec]:
        return self.layout.param_specs(self.model)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config, self.param_specs)

    @property
    def forward_options(self) -> ForwardOptions:
        constrained = functools.partial(constrain, self.mesh)
        return ForwardOptions(
            self.config.compute_dtype, self.config.remat, self.attention_impl, self.dispatch, constrained
        )

    def abstract_params(self, dtypes: Callable[[ParamSpec], Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and place of every leaf."""
        return {
            leaf.name: jax.ShapeDtypeStruct(
                leaf.shape(self.model), dtypes(leaf), sharding=param_sharding(self.mesh, leaf.dims)
            )
            for leaf in self.param_specs
        }

    def abstract_state(self) -> Any:
        """Shape, dtype and place of every array of the state; moments lie where their parameters do."""
        everywhere = replicated(self.mesh)
        params = self.abstract_params(lambda leaf: self.config.param_dtype)
        trained = {leaf.name: params[leaf.name] for leaf in self.param_specs if leaf.trains}

        def place_moment(path: tuple[Any, ...], moment: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in trained]
            same = names and trained[names[-1]].shape == moment.shape
            sharding = trained[names[-1]].sharding if same else everywhere
            return jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=sharding)

        moments = jax.tree_util.tree_map_with_path(place_moment, jax.eval_shape(self.optimizer.init, trained))
        whole = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        mean = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
        return TrainState(*cast(Any, (whole, trained, moments, whole, mean)))

    def init(self, trained: Arrays) -> TrainState:
        """The state before the first step; ``trained`` is taken over."""

        def make(trained: Arrays) -> TrainState:
            zero = jnp.zeros((), jnp.int32)
            return TrainState(zero, trained, self.optimizer.init(trained), zero, jnp.zeros((), jnp.float32))

        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        return jax.jit(make, out_shardings=shardings, donate_argnums=0)(trained)

    def _token_losses(
        self, trained: Arrays, frozen: Arrays, tokens: jax.Array, segments: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See ``models.loss.token_losses``."""
        model = Llama.from_params(self.model, as_model(trained, frozen, self.param_specs))
        # A device has its share of the batch and of the vocabulary, so that much more fits at a time.
        chunk = LOGITS * self.mesh.size // self.model.vocab_size
        return token_losses(model, tokens, chunk, segments, self.forward_options)

    def _sums(self, trained: Arrays, frozen: Arrays, tokens: jax.Array, segments: jax.Array) -> tuple[Any, Any]:
        """What is differentiated, summed over targets; and its parts: the cross-entropy, the number of targets, and the
        load-balancing loss."""
        losses_BT, log_z_BT, balance = self._token_losses(trained, frozen, tokens, segments)
        loss, count = losses_BT.sum(), jnp.sum(next_tokens(tokens, segments) >= 0)
        whole = loss + self.config.z_loss * jnp.square(log_z_BT).sum()
        if not self.model.num_experts:
            return whole, (loss, count)
        return whole + self.config.balance_loss * count * balance, (loss, count, balance)

    def _step(
        self, state: TrainState, frozen: Arrays, tokens: jax.Array, segments: jax.Array, stop: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        grad = jax.value_and_grad(self._sums, has_aux=True)

        def part(carry: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            (_, aux), gradients = grad(state.trained, frozen, *batch)
            return jax.tree.map(jnp.add, carry, (gradients, aux)), None

        parts = self.config.grad_accum_steps
        if parts == 1:
            (_, (loss, count, *balance)), gradients = grad(state.trained, frozen, tokens[0], segments[0])
        else:
            sums = (jnp.zeros(()), jnp.zeros((), jnp.int32), *([jnp.zeros(())] if self.model.num_experts else []))
            zeros = (jax.tree.map(jnp.zeros_like, state.trained), sums)
            (gradients, (loss, count, *balance)), _ = jax.lax.scan(part, zeros, (tokens, segments))
        gradients = jax.tree.map(lambda g: g / count.astype(g.dtype), gradients)
        loss, norm = loss / count, optax.tree.norm(gradients)

        # A bad step changes nothing but the count of bad ones: neither parameters nor moments ever see it.
        is_bad = ~jnp.isfinite(loss) | ~jnp.isfinite(norm)
        if self.config.spike:
            is_bad |= (state.step >= _SPIKE_AFTER) & (norm > self.config.spike * state.norm)
        updates, moments = self.optimizer.update(gradients, state.optimizer_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        running = jnp.where(state.norm == 0, norm, (1 - _NORM_WEIGHT) * state.norm + _NORM_WEIGHT * norm)
        kept = (state.trained, state.optimizer_state, state.norm)
        trained, moments, running = jax.tree.map(
            lambda old, new: jnp.where(is_bad, old, new), kept, (trained, moments, running)
        )
        step, skipped = state.step + 1, jnp.where(is_bad, state.skipped + 1, 0)
        metrics = {"loss": loss, "gradient_norm": norm, "skipped": skipped, "stop": stop.max()}
        if self.model.num_experts:
            metrics["balance"] = balance[0] / parts
        # Computed here and not where they are logged: there it would wait for the device. In a fixed order, as the
        # programs of all processes must be the same to the last operation, or their collectives deadlock.
        found = {group for leaf in self.param_specs if leaf.trains for group in leaf.groups}
        groups: list[Group] = [group for group in GROUPS if group in found]
        metrics |= {f"learning_rate_{group}": jnp.asarray(make_schedule(self.config, group)(step)) for group in groups}
        return TrainState(step, trained, moments, skipped, running), metrics

    @functools.cached_property
    def step(self) -> Any:
        """Jitted ``(state, frozen, tokens [A, B, T+1], segments [A, B, T+1], stop [devices]) -> (state, metrics)``.

        ``state`` is donated. ``stop`` holds for each device whether its process was told to stop; all get the answer.
        """
        everywhere = replicated(self.mesh)
        state = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        return jax.jit(self._step, donate_argnums=0, out_shardings=(state, everywhere))

    @functools.cached_property
    def validate(self) -> Any:
        """Jitted ``(trained, frozen, tokens [B, T+1], segments [B, T+1]) -> (summed loss in nats, targets)``."""

        def sums(trained: Arrays, frozen: Arrays, tokens: jax.Array, segments: jax.Array) -> Any:
            return self._sums(trained, frozen, tokens, segments)[1][:2]

        return jax.jit(sums, out_shardings=replicated(self.mesh))

    @functools.cached_property
    def token_losses(self) -> Any:
        """Jitted ``(trained, frozen, tokens [B, T+1]) -> cross-entropy of each token after the first [B, T]``, nats."""

        def losses(trained: Arrays, frozen: Arrays, tokens: jax.Array) -> Any:
            return self._token_losses(trained, frozen, tokens, None)[0]

        return jax.jit(losses, out_shardings=replicated(self.mesh))

    @property
    def batch_sharding(self) -> Any:
        """Of ``tokens`` and ``segments`` of a step."""
        return batch_sharding(self.mesh, ("A", "B", "T"))

    @property
    def lowest(self) -> int:
        """The lowest layer that gradients reach; as many as there are layers, if none."""
        trains = self.layout.trains
        # The look-up lies below all layers: once it trains, gradients reach down to it.
        if "embed_tokens" in self.layout.outer:
            return 0
        return trains.index(True) if any(trains) else len(trains)

    @property
    def is_head_trained(self) -> bool:
        return ("embed_tokens" if self.model.tie_word_embeddings else "lm_head") in self.layout.outer

    def flops_per_token(self, T: int) -> float:
        """FLOPs that a training step has to do for a token, at sequences of T tokens.

        Forward 2 for each weight of a matrix product; activation gradients 2 for those at or above the lowest that
        trains; weight gradients 2 for those that train. Causal attention counted half, its backward pass double, the
        head counted, the look-up of the embedding not, nor what is computed again.
        """
        per_layer = self.model.layer_matrix_params
        attention = 4 * self.model.sizes["Hh"] * T / 2
        head = self.model.vocab_size * self.model.hidden_size
        total = self.model.flops_per_token(T)
        total += (self.model.num_hidden_layers - self.lowest) * (2 * per_layer + 2 * attention) + 2 * head
        total += sum(self.layout.trains) * 2 * per_layer
        return total + 2 * head * self.is_head_trained
