"""Who may attend to whom, and biases by distance: as structure, so that no kernel has to hold [query, key]."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Mask:
    """Who may attend to whom. Keys stand at places 0, 1, … of a row, and queries at ``start``, ``start + 1``, ….

    Attributes:
      query_segments, key_segments: the document that each token belongs to; tokens attend within their own.
        0 is padding, to which nobody attends.
      start: place of the first query, of the keys that decoding has room for; none where queries are whole rows.
      prefix: 1 for keys that all of their segment may see, however early the query (prefix LM).
      causal: a query sees no key after it.
      whole: every row is one document without padding, which is known before any row is: segments are all 1.
    """

    query_segments: Int[Array, "batch query"]
    key_segments: Int[Array, "batch key"]
    start: Int[Array, ""] | None = None
    prefix: Int[Array, "batch key"] | None = None
    causal: bool = struct.field(pytree_node=False, default=False)
    whole: bool = struct.field(pytree_node=False, default=False)

    def rows(self) -> dict[str, Int[Array, "batch _"]]:
        """What it says of each token, by the names of the fields; those that are none are left out."""
        rows = {name: getattr(self, name) for name in ("query_segments", "key_segments", "prefix")}
        return {name: row for name, row in rows.items() if row is not None}

    def query_places(self) -> Int[Array, " query"]:
        """Where the queries stand."""
        places = jnp.arange(self.query_segments.shape[1])
        return places if self.start is None else self.start + places

    def distances(self) -> Int[Array, " distances"]:
        """Every ``key place - query place`` there is, in order: query + key - 1 of them."""
        queries, keys = self.query_segments.shape[1], self.key_segments.shape[1]
        distances = jnp.arange(queries + keys - 1) - (queries - 1)
        return distances if self.start is None else distances - self.start

    def allowed(self, window: int = 0) -> Bool[Array, "#batch query key"]:
        """The mask as a matrix, True where the query may attend to the key.

        Args:
          window: a query sees keys less than so many places away (itself included); 0 is no limit.
        """
        return allowed(self, self.query_places(), jnp.arange(self.key_segments.shape[1]), window)


def allowed(
    mask: Mask, query_places: Int[Array, " query"], key_places: Int[Array, " key"], window: int
) -> Bool[Array, "#batch query key"]:
    """:meth:`Mask.allowed` for a mask of some queries and keys of a row, which stand at these places."""
    distance = query_places[:, None] - key_places[None, :]
    allowed = jnp.ones((1, *distance.shape), bool)
    if mask.causal:
        past = (distance >= 0)[None]
        allowed &= past if mask.prefix is None else past | (mask.prefix[:, None, :] > 0)
    if window:
        allowed &= (abs(distance) < window)[None]
    if not mask.whole:
        keys = mask.key_segments[:, None, :]
        allowed &= (mask.query_segments[:, :, None] == keys) & (keys > 0)
    return allowed


def bias_matrix(bias: Float[Array, "heads distances"], queries: int) -> Float[Array, "heads query key"]:
    """A bias by distance (see :meth:`Mask.distances`) as a matrix: entry (q, k) is ``bias[k - q + queries - 1]``.

    Rows of one entry more than a row has, read as rows of that length, are each shifted by one: no gather, and its
    gradient no scatter.
    """
    heads, distances = bias.shape
    rows = jnp.broadcast_to(jnp.pad(bias, ((0, 0), (0, 1)))[:, None], (heads, queries, distances + 1))
    skewed = rows.reshape(heads, -1)[:, : queries * distances].reshape(heads, queries, distances)
    return jax.lax.slice_in_dim(skewed, queries - 1, distances, axis=2)
