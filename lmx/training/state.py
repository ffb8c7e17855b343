"""What training carries from step to step."""

import flax.struct
from jaxtyping import Array, Int, PyTree


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes: nothing else needs saving but the position in the data."""

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
