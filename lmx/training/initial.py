"""Where parameters come from, in this order: the run's own checkpoint, another run (``train.init_from``), scratch."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from lmx.config import Config
from lmx.errors import CheckpointError, ConfigError
from lmx.interop.opening import locate
from lmx.interop.pretrained import fresh_params, is_pretrained, load_params, open_checkpoint
from lmx.model_config import Model
from lmx.models.lora import ADAPTERS
from lmx.models.stack import to_layout
from lmx.models.transformer import Transformer, init_params
from lmx.parallel.sharding import Layout, like_params, on_host, param_shardings, use_layout
from lmx.training.checkpoints import Checkpoints
from lmx.training.experiment import Experiment
from lmx.training.progress import tell_reader
from lmx.training.state import TrainState, init_state


@dataclasses.dataclass(frozen=True)
class Resumed:
    """What a checkpoint holds beside the state.

    Attributes:
      position: in the data.
      pending: metrics of the steps that no line tells of yet.
    """

    position: dict
    pending: list


def state_layout(experiment: Experiment) -> TrainState:
    """The training state as ``jax.ShapeDtypeStruct`` with the sharding of every leaf."""
    boxed = experiment.abstract_params
    shardings, params = param_shardings(boxed, experiment.layout), nn.meta.unbox(boxed)
    state = jax.eval_shape(lambda p: init_state(p, experiment.optimizer()), params)
    placed = like_params(state, params, shardings, experiment.mesh)
    if experiment.config.optimizer.offload:
        placed = placed.replace(opt_state=jax.tree.map(on_host, placed.opt_state))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)


def initial_state(
    experiment: Experiment, optimizer: optax.GradientTransformation, checkpoints: Checkpoints | None, console: Console
) -> tuple[TrainState, Resumed | None]:
    """The state to start from, on the mesh, and what else this run's checkpoint knows (none: it starts)."""
    config, layout = experiment.config, state_layout(experiment)

    # 1. This run's own newest checkpoint.
    tell = functools.partial(tell_reader, console)
    saved = checkpoints.restore_newest(layout, tell) if checkpoints is not None else None
    if saved is not None:
        state, position, meta = saved
        console.print(f"[bold]resumed[/] at step {meta['step']:,} from {checkpoints.folder}", soft_wrap=True)
        return state, Resumed(position, meta.get("pending", []))

    shardings = jax.tree.map(lambda x: x.sharding, layout)
    with use_layout(experiment.layout):
        draw = jax.jit(lambda key: nn.meta.unbox(experiment.init_params(key)), out_shardings=shardings.params)
        params = draw(jax.random.key(config.seed))

    # 2. Another run's parameters, with fresh heads where its own don't fit.
    if config.train.init_from:
        params, fresh = _taken_over(config, params, experiment.layout)
        console.print(
            f"[bold]started[/] from {config.train.init_from}; fresh: {', '.join(fresh) or 'nothing'}", soft_wrap=True
        )

    # 3. Scratch.
    with use_layout(experiment.layout):
        start = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings, donate_argnums=0)
        return start(params), None


def check_init_from(experiment: Experiment) -> None:
    """Raises where ``train.init_from`` does not fit the model, or lacks what would not be trained; reads no array."""
    source, model = experiment.config.train.init_from, experiment.config.model
    if not source:
        return
    folder = locate(source)
    if is_pretrained(folder):
        fresh = fresh_params(folder, *open_checkpoint(folder), model)
    else:
        with Checkpoints(source, read_only=True) as checkpoints:
            saved = checkpoints.abstract_params()
        found = jax.eval_shape(lambda params: to_layout(params, model), saved)
        _, fresh = _take_over(source, nn.meta.unbox(experiment.abstract_params), found)
    _check_fresh(experiment, fresh)


def _taken_over(config: Config, params: Any, layout: Layout) -> tuple[Any, list[str]]:
    """The other run's parameters in the layout of ``params``, and the names of those kept fresh (heads only)."""
    folder = locate(config.train.init_from)
    if is_pretrained(folder):
        theirs, tensors = open_checkpoint(folder)
        found, report = load_params(folder, theirs, tensors, config.model, layout, "float32", config.seed)
        return found, list(report.fresh)
    with Checkpoints(config.train.init_from, read_only=True) as checkpoints:
        wanted = _placed(checkpoints.abstract_params(), config.model, layout)
        found = jax.jit(lambda saved: to_layout(saved, config.model))(checkpoints.restore_params(wanted))
    return _take_over(config.train.init_from, params, found)


def _placed(saved: Any, model: Model, layout: Layout) -> Any:
    """``saved``, shapes of parameters with layers scanned or not, each with the sharding that ``model``'s own has; what
    the model lacks is whole on every device."""
    places = {}
    for scan_layers in (True, False):
        either = Transformer(dataclasses.replace(model, scan_layers=scan_layers))
        boxed = jax.eval_shape(lambda either=either: init_params(either, jax.random.key(0)))
        own, shardings = jax.tree.leaves_with_path(nn.meta.unbox(boxed)), param_shardings(boxed, layout)
        for (path, leaf), sharding in zip(own, jax.tree.leaves(shardings), strict=True):
            places[_name(path), leaf.shape] = sharding

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        whole = NamedSharding(layout.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=places.get((_name(path), tuple(leaf.shape)), whole)
        )

    return jax.tree_util.tree_map_with_path(place, saved)


def _check_fresh(experiment: Experiment, fresh: Sequence[str]) -> None:
    """Raises :class:`ConfigError` where a fresh parameter would stay as it was drawn."""
    trained = {_name(path): on for path, on in jax.tree_util.tree_leaves_with_path(experiment.trainable())}
    idle = [name for name in fresh if not trained[name]]
    if idle:
        raise ConfigError(
            f"{idle[0]} is not in train.init_from and would stay as it was drawn: beside adapters only the heads of "
            f"model.lora.heads ({', '.join(experiment.config.model.lora.heads)}) are trained; name its head there too."
        )


def _take_over(source: str, params: Any, found: Any) -> tuple[Any, list[str]]:
    """``params`` with every leaf that ``found`` has in the same shape; a head may lack one, the body may not."""
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
    fresh = []

    def choose(path: tuple, leaf: Any) -> Any:
        name = _name(path)
        other = leaves.get(name)
        if other is not None and other.shape == leaf.shape:
            return other
        if path[0].key == "heads" or path[-1].key in ADAPTERS:
            fresh.append(name)
            return leaf
        raise CheckpointError(
            f"train.init_from={source!r} does not fit this model: {name} has shape {leaf.shape} here and "
            f"{'is missing' if other is None else other.shape} there. Only heads and adapters may "
            "differ; make config.model agree."
        )

    return jax.tree_util.tree_map_with_path(choose, params), fresh


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
