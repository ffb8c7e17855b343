"""The one train step: a pure function of (state, batch), whatever the model, the objective and the devices.

A loss is a sum and a weight. The weights of the whole batch are known from the batch alone, so each micro-batch
contributes ``sum / whole weight`` and the parts add up to the one right mean, however unequal their padding is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from lmx.objectives import Batch, Objective
from lmx.training.state import TrainState, step_rngs

Metrics = dict[str, tuple[Array, Array]]
EXPERT_LOSSES = ("load_balance", "router_z")
SKIPPED = "skipped"


def make_train_step(
    model: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    trainable: PyTree | None = None,
    microbatches: int = 1,
    seed: int = 0,
    axis_name: str | None = None,
    offload: bool = False,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds ``train_step(state, batch) -> (state, metrics)``.

    Args:
      model: the Transformer.
      objective: scores a batch.
      optimizer: turns gradients into updates.
      schedule: the learning rate, for the metrics.
      trainable: for each parameter whether it is trained, by :func:`lmx.training.optimizers.trainable`; none: all are.
        No gradient is computed for the others.
      microbatches: parts that the batch is computed in, one after the other.
      seed: of dropout and jitter.
      axis_name: the mapped axis when each device runs the step on its own rows (pmap); none when the whole
        batch is one array (jit over a mesh).
      offload: the optimizer's state comes from the host's memory; the caller's output shardings send it back there.
      skip_nonfinite: where a metric of the batch is not finite (its loss or the norm of its gradients, say), parameters
        and optimizer stay as they are, and the batch counts in no metric but ``skipped``. Decided on the device.

    Returns:
      The step. Its metrics are pairs of sum and weight: the objective's terms (``loss`` among them), the experts'
      losses, ``grad_norm`` (of what is trained), ``learning_rate`` and ``packing_efficiency`` (the part of a batch that
      is not padding).
    """

    def total(x):
        return jax.lax.psum(x, axis_name) if axis_name else x

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        weights = total(objective.weights(batch) | dict.fromkeys(EXPERT_LOSSES, real_rows(batch)))

        def loss(trained, microbatch, index):
            params = _filled(trainable, trained, state.params)
            rngs = step_rngs(seed, state.step, index)
            if axis_name:
                rngs = {name: jax.random.fold_in(key, jax.lax.axis_index(axis_name)) for name, key in rngs.items()}
            terms = loss_terms(model, objective, params, microbatch, rngs)
            optimized = [name for name in (*objective.optimized, *EXPERT_LOSSES) if name in terms]
            return sum(terms[name][0] / jnp.maximum(weights[name], 1.0) for name in optimized), terms

        gradient = jax.grad(loss, has_aux=True)
        trained = _only(trainable, state.params)
        if microbatches == 1:
            grads, terms = gradient(trained, batch, 0)
        else:
            grads, terms = _accumulate(gradient, trained, batch, microbatches)
        grads, terms = total((grads, terms))
        norm = optax.tree.norm(grads)
        grads = _filled(trainable, grads, jax.tree.map(jnp.zeros_like, state.params))
        old_opt_state = jax.device_put(state.opt_state, jax.memory.Space.Device) if offload else state.opt_state
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, old_opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = terms | {
            "grad_norm": (norm, jnp.ones(())),
            "learning_rate": (jnp.asarray(schedule(state.step), jnp.float32), jnp.ones(())),
            "packing_efficiency": total(packing_efficiency(batch)),
        }
        if skip_nonfinite:
            finite = jnp.isfinite(jnp.stack([x.astype(jnp.float32) for x in jax.tree.leaves(metrics)])).all()
            before = (state.params, old_opt_state, jax.tree.map(jnp.zeros_like, metrics))
            params, opt_state, metrics = _either(finite, (params, opt_state, metrics), before)
            metrics[SKIPPED] = (1.0 - finite, jnp.ones(()))
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(
    model: nn.Module, objective: Objective, axis_name: str | None = None
) -> Callable[[Any, Batch], Metrics]:
    """Builds ``eval_step(params, batch) -> terms``, without dropout and label smoothing."""

    def eval_step(params: Any, batch: Batch) -> Metrics:
        terms = loss_terms(model, objective, params, batch, None)
        return jax.lax.psum(terms, axis_name) if axis_name else terms

    return eval_step


def loss_terms(
    model: nn.Module, objective: Objective, params: Any, batch: Batch, rngs: Mapping[str, Array] | None
) -> Metrics:
    """The objective's terms and the experts' losses, each a sum and a weight. Trains if there are ``rngs``."""
    terms, sown = model.apply(
        {"params": params}, batch, rngs is not None, method=objective.terms, rngs=rngs, mutable=["experts"]
    )
    return terms | expert_terms(sown.get("experts", {}), batch)


def expert_terms(sown: Mapping[str, Any], batch: Batch) -> Metrics:
    """What Switch layers sowed, summed over layers and rows; ``dropped`` is the mean over sparse layers."""
    by_name: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(sown):
        by_name.setdefault(path[-1].key, []).append(leaf.reshape(-1, leaf.shape[-1]))
    rows = real_rows(batch)
    sums = {name: jnp.concatenate(values) for name, values in by_name.items()}
    return {name: (values.sum() / (len(values) if name == "dropped" else 1), rows) for name, values in sums.items()}


def real_rows(batch: Batch) -> Float[Array, ""]:
    """Rows that hold any token."""
    name = "decoder_segments" if "decoder_segments" in batch else "segments"
    return (batch[name] > 0).any(-1).sum().astype(jnp.float32)


def packing_efficiency(batch: Batch) -> tuple[Array, Array]:
    """Tokens of a batch, and the places that it has for them: their quotient is the part that is not padding."""
    segments = [batch[name] for name in batch if name.endswith("segments")]
    tokens = sum(jnp.sum(part > 0, dtype=jnp.float32) for part in segments)
    return tokens, jnp.float32(sum(part.size for part in segments))


def _either(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    """Every leaf from one tree or from the other."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _only(mask: PyTree | None, tree: PyTree) -> PyTree:
    """The leaves that the mask has, nothing in place of the others."""
    return tree if mask is None else jax.tree.map(lambda kept, x: x if kept else optax.MaskedNode(), mask, tree)


def _filled(mask: PyTree | None, part: PyTree, others: PyTree) -> PyTree:
    """The inverse of :func:`_only`, with the other leaves from ``others``."""
    return part if mask is None else jax.tree.map(lambda kept, x, other: x if kept else other, mask, part, others)


def _accumulate(gradient, params, batch, microbatches):
    """Sums gradients and terms over micro-batches: row i goes to micro-batch i % n, so that no row changes device."""
    parts = {
        name: x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)
        for name, x in batch.items()
    }

    def body(sums, index_and_part):
        index, part = index_and_part
        return jax.tree.map(jnp.add, sums, gradient(params, part, index)), None

    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first, 0))
    return jax.lax.scan(body, zeros, (jnp.arange(microbatches), parts))[0]
