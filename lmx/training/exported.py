"""The parameters of an exported model: one Orbax tree in a folder, without optimizer or steps."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from lmx.errors import CheckpointError


def write_params(folder: Path, params: PyTree) -> None:
    """Writes a pytree of arrays into ``folder``, which must not exist."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, params)


def read_params(folder: Path, layout: PyTree) -> PyTree:
    """Reads what :func:`write_params` wrote.

    Args:
      layout: a pytree of ``jax.ShapeDtypeStruct`` with the shapes expected and the shardings wanted.

    Raises:
      CheckpointError: the folder is damaged, or holds other names or shapes.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            if _shapes(checkpointer.metadata(folder).item_metadata.tree) == _shapes(layout):
                return checkpointer.restore(folder, layout)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            raise CheckpointError(f"{folder} is damaged ({reason}); export the model again.") from error
    raise CheckpointError(f"the parameters in {folder} do not fit the config.json beside it; export the model again.")


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)
