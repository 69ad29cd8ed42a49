"""``tli_jax.Trainer``: training step by step, in a notebook or a script, with the programs of ``tli-jax train``."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.cli.parse import from_values
from tli_jax.cli.train_config import Recipe, TrainConfig
from tli_jax.distributed.kernels import choose_attention, choose_dispatch
from tli_jax.distributed.mesh import (
    batch_degree,
    batch_sharding,
    check_fits,
    describe_slices,
    make_mesh,
    param_sharding,
)
from tli_jax.distributed.processes import flag_array
from tli_jax.errors import UsageError
from tli_jax.growth.plan import Plan
from tli_jax.hf.grown_config import grown_config
from tli_jax.models.config import LlamaConfig
from tli_jax.training.fit import fit, free_memory, require_fit
from tli_jax.training.freezing import Arrays, group, make_layout, ungroup
from tli_jax.training.step import Programs, TrainState
from tli_jax.training.text import sequence_length

_RECIPE = {field.name for field in dataclasses.fields(Recipe)} | {"only"}


class TrainerState(NamedTuple):
    """What a ``Trainer`` passes from step to step: a pytree.

    Attributes:
        train: what a step updates: parameters, optimizer state and counts.
        frozen: parameters that stay as they are.
    """

    train: TrainState
    frozen: Arrays


class Trainer(Programs):
    """Trains a Llama on a mesh, all of it or only some layers.

    It runs the programs of ``tli-jax train``, so the same batches give the same losses bit for bit::

        import numpy as np
        import tli_jax

        config, params = tli_jax.load_hf("embedded")
        plan = tli_jax.tli(config.num_hidden_layers, every=4)
        params = tli_jax.inject(params, plan)

        trainer = tli_jax.Trainer.create(
            config, plan=plan, only="injected", learning_rate=1e-3, steps=10, batch_size=8, sequence_length=128
        )
        state = trainer.init_from(params)
        batches = np.random.default_rng(0).integers(0, config.vocab_size, (10, 8, 129))  # inputs and targets overlap
        for tokens_BT in batches:
            state, metrics = trainer.train_step(state, tokens_BT)
        print(float(metrics["loss"]), trainer.evaluate(state, tokens_BT))
        tli_jax.save_hf("trained", config, trainer.params(state, config.dtype), plan=plan)
    """

    @classmethod
    def create(
        cls, config: LlamaConfig, *, plan: Plan | None = None, devices: Sequence[Any] | None = None, **options: Any
    ) -> "Trainer":
        """Choose the mesh, kernels and trainable layers.

        Args:
            config: configuration of the model, or of its base if ``plan`` is given.
            plan: how the model was grown; needed for ``only="injected"`` and for learning rates by group.
            devices: devices to train on; all by default.
            options: options of the training recipe, as listed by ``tli-jax train --help``, such as ``only``,
                ``learning_rate``, ``warmup``, ``steps``, ``optimizer``, ``mesh`` and ``dtypes``. Options about reading
                text have no effect. ``steps`` sets the length of the learning-rate schedule.

        Raises:
            UsageError: an option is unknown or wrong, or does not fit the model or the devices. With ``remat: auto``,
                the default, the step is compiled here, and must fit in memory.

        Warns:
            UserWarning: ``sequence_length`` is larger than the model's context.
        """
        of_commands = {field.name for field in dataclasses.fields(TrainConfig)} - _RECIPE
        if wrong := sorted(of_commands & options.keys()):
            raise UsageError(f"Trainer.create: {', '.join(wrong)}: only for tli-jax train: remove it")
        if plan is not None:
            experts = config.num_experts if plan.experts is None else plan.experts.total
            if (config.num_hidden_layers, config.num_experts) != (len(plan), experts):
                config = grown_config(config, plan)
        trainer, T, notes = make_trainer(from_values(TrainConfig, options, "Trainer.create"), config, plan, devices)
        for note in notes:
            if note.startswith("warning: "):
                warnings.warn(note.removeprefix("warning: "), stacklevel=2)
        if trainer.config.remat == "auto":
            limit = free_memory(trainer.mesh)
            trainer, memory = fit(trainer, T, lambda spec: config.dtype, limit, lambda line: None)
            require_fit(trainer, T, memory, limit)
        return trainer

    def init_from(self, params: dict[str, Any]) -> TrainerState:
        """The state before the first step.

        Args:
            params: layer-stacked params as from ``load_hf`` or ``inject``, on any device or mesh. Trainable ones are
                copied and cast to ``param_dtype``. Frozen ones keep their dtype and may share memory with ``params``.
        """
        trained, frozen = self.shard(params)
        return TrainerState(self.init(trained), frozen)

    def shard(self, params: dict[str, Any]) -> tuple[Arrays, Arrays]:
        """Layer-stacked params as the ``(trained, frozen)`` arrays of ``Programs``; ``trained`` is a copy."""
        shardings = {spec.name: param_sharding(self.mesh, spec.dims) for spec in self.param_specs}
        trained, frozen = group(params, self.param_specs)
        trained, frozen = (jax.device_put(part, {name: shardings[name] for name in part}) for part in (trained, frozen))
        # Copied after they are sharded: one device might not hold them all.
        return {name: jnp.array(x, self.config.param_dtype, copy=True) for name, x in trained.items()}, frozen

    def train_step(
        self, state: TrainerState, tokens_BT: Any, segments_BT: Any = None
    ) -> tuple[TrainerState, dict[str, jax.Array]]:
        """One optimizer step. Returns without waiting for the devices.

        Args:
            state: donated, so use only the returned state afterwards.
            tokens_BT: ids, ``[batch_size, sequence_length + 1]``, NumPy or JAX; -1 is padding. All processes pass the
                same complete batch.
            segments_BT: the document of each token, same shape; attention and loss stay within a document. By default
                each row is one document.

        Returns:
            The next state, and metrics as scalar arrays: ``loss`` in nats per token, ``gradient_norm``, ``skipped``
            (consecutive steps skipped because of a spike or a value that is not finite), ``learning_rate_GROUP``, and
            ``balance`` if the model has experts.

        Raises:
            ValueError: a shape is wrong, or an id is not an integer or not in the vocabulary.
        """
        shape = (self.config.batch_size, sequence_length(self.config, self.model) + 1)
        if np.shape(tokens_BT) != shape:
            raise ValueError(
                f"tokens_BT has shape {np.shape(tokens_BT)}, not [batch_size, sequence_length + 1], {shape}"
            )
        microbatches = (self.config.grad_accum_steps, -1, shape[1])
        batch = (x.reshape(microbatches) for x in self._batch(tokens_BT, segments_BT))
        tokens, segments = (jax.make_array_from_callback(x.shape, self.batch_sharding, x.__getitem__) for x in batch)
        train, metrics = self.step(state.train, state.frozen, tokens, segments, flag_array(self.mesh, False))
        del metrics["stop"]
        return TrainerState(train, state.frozen), metrics

    def evaluate(self, state: TrainerState, tokens_BT: Any, segments_BT: Any = None) -> float:
        """Mean loss in nats per token, with the arguments of ``train_step``. Any number of rows, which all run at once.

        Returns NaN if there are no targets.

        Raises:
            ValueError: a shape is wrong, or an id is not an integer or not in the vocabulary.
        """
        tokens, segments = self._batch(tokens_BT, segments_BT)
        if not len(tokens):
            return float("nan")
        pad = ((0, -len(tokens) % batch_degree(self.mesh)), (0, 0))
        batch = np.pad(tokens, pad, constant_values=-1), np.pad(segments, pad)
        sharding = batch_sharding(self.mesh, ("B", "T"))
        batch = (jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in batch)
        nats, count = jax.device_get(self.validate(state.train.trained, state.frozen, *batch))
        return float(nats) / int(count) if count else float("nan")

    def params(self, state: TrainerState, dtype: Any = None) -> dict[str, Any]:
        """Layer-stacked params as ``init_from`` takes them, for ``save_hf``, ``forward`` or ``generate_tokens``.

        Args:
            dtype: dtype of all params; by default that of training, promoted within each stack.
        """
        params = ungroup(state.train.trained, state.frozen, self.param_specs)
        # Copied because the next step donates the state.
        return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params)

    def _batch(self, tokens_BT: Any, segments_BT: Any) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.asarray(tokens_BT)
        segments = np.zeros(tokens.shape) if segments_BT is None else np.asarray(segments_BT)
        if tokens.ndim != 2 or tokens.shape != segments.shape:
            raise ValueError(f"tokens_BT has shape {tokens.shape}, segments_BT {segments.shape}: both must be [B, T+1]")
        # Checked before the cast, which would turn 2**32 or 0.5 into 0.
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens_BT has dtype {tokens.dtype}, ids are integers")
        low, high, V = tokens.min(initial=0), tokens.max(initial=0), self.model.vocab_size
        if low < -1 or high >= V:
            raise ValueError(f"tokens_BT has ids from {low} to {high}, the vocabulary has {V}")
        return tokens.astype(np.int32), segments.astype(np.int32)


def make_trainer(
    config: TrainConfig, model: LlamaConfig, plan: Plan | None, devices: Sequence[Any] | None = None
) -> tuple[Trainer, int, list[str]]:
    """Choose the mesh, kernels and trainable layers of a run.

    Args:
        model: configuration of the model that trains.
        plan: how it was grown; None if it was not.
        devices: devices to run on or to compile for; all by default.

    Returns:
        The trainer, the sequence length T, and notes for the log.

    Raises:
        UsageError: layers, mesh, kernel or batch size do not fit the model or the devices.
        DataError: the model uses a RoPE type that is not supported.
    """
    model.check_runnable()
    T = sequence_length(config, model)
    layout = make_layout(model, None if plan is None else plan.injected, config.only, config.outer)
    mesh = make_mesh(config.mesh, devices)
    if not config.grad_accum_steps:
        config = dataclasses.replace(config, grad_accum_steps=max(1, config.batch_size // batch_degree(mesh)))
    if config.batch_size % config.grad_accum_steps:
        raise UsageError(
            f"batch_size {config.batch_size} is not a multiple of grad_accum_steps {config.grad_accum_steps}: change"
            " one of them"
        )
    sizes = model.sizes | {"H": model.num_attention_heads, "K": model.num_key_value_heads}
    check_fits(mesh, sizes, config.batch_size // config.grad_accum_steps)
    kernel, kernel_note = choose_attention(
        config.attention, mesh, T, model.head_dim, config.compute_dtype, config.isolate
    )
    dispatch, dispatch_note = choose_dispatch(mesh)
    notes = [f"attention: {kernel_note}"] + ([f"experts: {dispatch_note}"] if model.num_experts else [])
    if slices := describe_slices(mesh):
        notes.append(f"mesh: {slices}")
    if (context := model.max_position_embeddings) < T:
        notes.append(f"warning: sequence_length {T} is larger than the model's context, {context}")
    return Trainer(model, config, layout, mesh, kernel, dispatch, kernel_note), T, notes
