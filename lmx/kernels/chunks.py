"""How a computation goes through the places of a batch: a chunk at a time, and past those that do not count."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from lmx.parallel.sharding import constrain, current_layout

# Most logits of a chunk on a device, 256 MiB; with fewer, products are smaller and gradients are summed more often.
CHUNK_LOGITS = 1 << 26
CHUNK = ("batch", None, "length", None)  # logical names of a chunk's dimensions, but the last
PARTS = 8  # how finely the number of places that count is told apart; a program for each is compiled


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How [batch, length] is cut: every device goes through its own rows, some of their places at a time.

    A chunk is [shards of rows, rows, shards of places, places, ...]: what a device holds stays where it is, and a sum
    over the batch can wait until all chunks have been seen.
    """

    batch: int
    length: int
    row_shards: int
    place_shards: int
    count: int
    places: int

    @classmethod
    def of(cls, batch: int, length: int, vocab_size: int, limit: int) -> "Chunks":
        """As few chunks as keep a device's logits of one within ``limit``, but never one of more than
        :data:`CHUNK_LOGITS`."""
        layout = current_layout()
        shards = (1, 1, 1)
        if layout is not None:
            split = layout.activation_axes(("batch", "length", "vocab"), (batch, length, vocab_size))
            shards = tuple(map(layout.devices_along, split))
        row_shards = shards[0] if batch % shards[0] == 0 else 1
        own_length = -(-length // shards[1])
        own_logits = batch // row_shards * -(-vocab_size // shards[2])  # of one place of each row
        count = -(-own_length // max(1, limit // own_logits))
        count = max(count, 2 if own_length * own_logits > CHUNK_LOGITS else 1)
        places = -(-own_length // count)  # about as many in each chunk, so that little is padding
        return cls(batch, length, row_shards, shards[1], -(-own_length // places), places)

    def split(self, x: Shaped[Array, "batch length ..."]) -> Shaped[Array, "chunks ..."]:
        """All chunks; places that are added hold zeros."""
        more = self.place_shards * self.count * self.places - self.length
        x = jnp.pad(x, [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)])
        x = x.reshape(self.row_shards, -1, self.place_shards, self.count, self.places, *x.shape[2:])
        return constrain(jnp.moveaxis(x, 3, 0), None, *CHUNK, *[None] * (x.ndim - 5))

    def join(self, x: Shaped[Array, "chunks ..."]) -> Shaped[Array, "batch length ..."]:
        """The inverse of :meth:`split`."""
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(self.batch, -1, *x.shape[5:])[:, : self.length]


Compute = Callable[[tuple[Array, ...]], tuple[Any, Any]]


def in_chunks(
    compute: Compute, vocab_size: int, limit: int, *places: Shaped[Array, "batch length ..."]
) -> tuple[Any, Any]:
    """What ``compute`` finds of all chunks: sums, and what there is of every place as [batch, length, ...].

    Args:
      compute: takes ``places`` as chunks, and gives sums and what there is of each place of the chunks.
      vocab_size: logits of a place.
      limit: see :meth:`Chunks.of`.
      places: what there is of each place.
    """
    chunks = Chunks.of(*places[0].shape[:2], vocab_size, limit)
    sums, outputs = compute(tuple(map(chunks.split, places)))
    return sums, jax.tree.map(chunks.join, outputs)


def in_chunks_that_count(
    compute: Compute, vocab_size: int, limit: int, *places: Shaped[Array, "batch length ..."]
) -> tuple[Any, Any]:
    """:func:`in_chunks` without the places whose weight, the last of ``places``, is zero: there all outputs are.

    How many others there are is known only when a batch is there. They are put first, and as many eighths of the batch
    as hold them are computed, each number of eighths by a program of its own. Over several devices all of the batch is.
    """
    weights: Float[Array, "batch length"] = places[-1]
    layout = current_layout()
    if layout is not None and layout.mesh.size > 1:
        return in_chunks(compute, vocab_size, limit, *places)
    total = weights.size
    order = jnp.argsort(weights.reshape(total) == 0, stable=True)
    ordered = [x.reshape(1, total, *x.shape[2:])[:, order] for x in places]

    def of_first(size: int, places: list[Array]) -> tuple[Any, Any]:
        sums, outputs = in_chunks(compute, vocab_size, limit, *(x[:, :size] for x in places))
        return sums, jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, total - size), *[(0, 0)] * (x.ndim - 2)]), outputs)

    sizes = sorted({-(-total * part // PARTS) for part in range(1, PARTS + 1)})
    enough = jnp.searchsorted(jnp.array(sizes), jnp.count_nonzero(weights))
    sums, outputs = jax.lax.switch(enough, [functools.partial(of_first, size) for size in sizes], ordered)
    place = jnp.argsort(order)
    return sums, jax.tree.map(lambda x: x[0, place].reshape(*weights.shape, *x.shape[2:]), outputs)
