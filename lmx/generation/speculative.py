"""Speculative decoding (Leviathan et al. 2023, algorithm 1; Chen et al. 2023): a small model proposes tokens.

The model checks them: a pass over several tokens takes hardly longer than one over a single token, since both read all
parameters. Proposed tokens are taken with such probabilities that what is written has the very distribution of the
model alone. All rows go on together, by as many tokens as every one of them has taken; in a row that would have taken
more, what it took is kept so far. That leaves each row's distribution as it is, since how far all go is decided by
tokens before those left out.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from lmx.generation.decode import Decoding, Generated, Rules, advance, forward
from lmx.generation.sampling import Sampling, probabilities
from lmx.models.transformer import Transformer


@functools.partial(jax.jit, static_argnames=("models", "ahead"), donate_argnames=("generated", "decodings"))
def speculate(
    models: tuple[Transformer, Transformer],
    params: tuple[PyTree, PyTree],
    generated: Generated,
    decodings: tuple[Decoding, Decoding],
    rules: Rules,
    max_new_tokens: Int[Array, ""],
    ahead: int,
) -> tuple[Generated, tuple[Decoding, Decoding]]:
    """As :func:`lmx.generation.decode.loop`, several tokens a turn.

    Args:
      models, params, decodings: of the model and of the draft.
      generated: with room for ``ahead`` tokens more than ``max_new_tokens``, and so the caches.
      ahead: tokens proposed a turn.
    """

    def unfinished(carry):
        return (carry[0].count < max_new_tokens) & ~carry[0].stopped.all()

    def turn(carry):
        generated, (ours, theirs) = carry
        start, keys = ours.cache.index, _keys(rules.rngs, generated.count, ahead)
        last = generated.tokens[:, generated.count - 1]
        proposed, likely, theirs = _propose(models[1], params[1], last, theirs, rules.sampling, keys)
        tokens = jnp.concatenate([last[:, None], proposed], axis=1)
        logits, ours = forward(models[0], params[0], tokens, ours, scored=ahead + 1)
        taken, wanted = check(proposed, likely, probabilities(logits, rules.sampling), keys[:, -1])
        taken = jnp.where(generated.stopped, ahead, taken)
        least = taken.min()
        other = jnp.where(taken > least, jnp.pad(proposed, ((0, 0), (0, 1)))[:, least], wanted[:, least])
        generated = _joined(generated, proposed, other, least, rules)
        kept = start + least + 1  # what is in the caches beyond was not taken, and will be written over
        back = tuple(d.replace(cache=d.cache.replace(index=kept)) for d in (ours, theirs))
        return generated, back

    return jax.lax.while_loop(unfinished, turn, (generated, decodings))


def _keys(rngs: Key[Array, " batch"], count: Int[Array, ""], ahead: int) -> Key[Array, "batch draws"]:
    """Keys of a turn: of each proposal, of one beyond that is not used, and of checking."""
    return jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, count), ahead + 2))(rngs)


def _propose(
    model: Transformer,
    params: PyTree,
    last: Int[Array, " batch"],
    decoding: Decoding,
    sampling: Sampling,
    keys: Key[Array, "batch draws"],
) -> tuple[Int[Array, "batch ahead"], Float[Array, "batch ahead vocab"], Decoding]:
    """The draft's tokens and the distributions they were drawn from; its cache then holds them all."""

    def one(carry, key):
        token, decoding = carry
        logits, decoding = advance(model, params, token, decoding)
        likely = probabilities(logits, sampling)
        token = jax.vmap(_drawn)(likely, key)
        return (token, decoding), (token, likely)

    (_, decoding), (tokens, likely) = jax.lax.scan(one, (last, decoding), keys[:, :-1].T)
    return tokens[:-1].T, likely[:-1].swapaxes(0, 1), decoding


def check(
    proposed: Int[Array, "batch ahead"],
    likely: Float[Array, "batch ahead vocab"],
    wanted: Float[Array, "batch ahead+1 vocab"],
    keys: Key[Array, " batch"],
) -> tuple[Int[Array, " batch"], Int[Array, "batch ahead+1"]]:
    """How many proposals each row takes, and the token that stands in for the first that it does not.

    Args:
      proposed, likely: the draft's tokens and their distributions.
      wanted: the model's distributions at the same places, and at the one after them.

    Returns:
      The number, and the token for every place that it could be at.
    """

    def row(proposed, likely, wanted, key):
        of_taking, of_others = jax.random.split(key)
        ahead = proposed.shape[0]
        places = jnp.arange(ahead)
        draws = jax.random.uniform(of_taking, (ahead,))
        takes = draws * likely[places, proposed] < wanted[places, proposed]
        missing = jnp.maximum(wanted - jnp.pad(likely, ((0, 1), (0, 0))), 0)
        missing = jnp.where(missing.sum(-1, keepdims=True) > 0, missing, wanted)
        others = jax.vmap(_drawn)(missing, jax.random.split(of_others, ahead + 1))
        return jnp.cumprod(takes).sum(), others

    return jax.vmap(row)(proposed, likely, wanted, keys)


def _drawn(weights: Float[Array, " vocab"], key: Key[Array, ""]) -> Int[Array, ""]:
    """A token with a probability in proportion to its weight."""
    return jax.random.categorical(key, jnp.log(weights)).astype(jnp.int32)


def _joined(
    generated: Generated,
    proposed: Int[Array, "batch ahead"],
    other: Int[Array, " batch"],
    least: Int[Array, ""],
    rules: Rules,
) -> Generated:
    """What has been written, with ``least`` of the proposals and the other token after them."""
    places = jnp.arange(proposed.shape[1] + 1)
    tokens = jnp.where(places == least, other[:, None], jnp.pad(proposed, ((0, 0), (0, 1))))
    ends = (tokens[:, :, None] == rules.stops).any(-1) & (places <= least)
    over: Bool[Array, "batch ahead+1"] = generated.stopped[:, None] | (jnp.cumsum(ends, axis=1) - ends > 0)
    tokens = jnp.where(over | (places > least), rules.pad_id, tokens)
    joined = jax.lax.dynamic_update_slice_in_dim(generated.tokens, tokens, generated.count, axis=1)
    return Generated(generated.count + least + 1, joined, generated.stopped | ends.any(1))
