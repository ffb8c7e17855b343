"""A config's train step, compiled for devices that need not be here, from shapes alone."""

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from lmx.config import Config
from lmx.errors import CheckpointError, LmxError
from lmx.interop.opening import body_of, locate
from lmx.interop.pretrained import is_pretrained
from lmx.models.transformer import Transformer
from lmx.objectives import make_objective
from lmx.parallel.compile import check_strategy
from lmx.parallel.mesh import split_batch
from lmx.parallel.pipeline import check_pipeline
from lmx.parallel.sharding import Layout, all_names, batch_sharding
from lmx.planning.targets import Target, quiet
from lmx.text.corpora import open_source
from lmx.text.pipeline import make_batches
from lmx.text.tokenizers import ByteTokenizer, load_tokenizer, make_tokenizer
from lmx.training.experiment import Experiment, record_fields
from lmx.training.initial import state_layout
from lmx.training.loop import compiled_train_step
from lmx.training.state import TrainState

OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Ran out of memory", "Out of memory", "out of memory")


@dataclasses.dataclass(frozen=True)
class Program:
    """A train step, compiled where there is a compiler for it.

    Attributes:
      experiment: with a stand-in for the tokenizer: the vocabulary is the config's, and no text is read.
      state: shapes and shardings of the training state.
      batch: shapes and shardings of a global batch.
      compiled: none where the compiler found that it does not fit, or where there is no compiler.
      seconds: that compiling took.
      error: what the compiler said where it does not fit; empty otherwise.
    """

    experiment: Experiment
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    compiled: Any
    seconds: float
    error: str = ""


def as_it_runs(config: Config) -> tuple[Config, list[str]]:
    """The config with what a run takes from elsewhere, as far as that is here: the body and the vocabulary's size.

    Returns:
      The config, which names nothing that is elsewhere any more, and sentences on what was taken and what is not known.
    """
    source, said, folder = config.train.init_from, [], None
    if source:
        config = config.replace(train={"init_from": ""})
        try:
            folder = locate(source, cached=True)
        except CheckpointError as error:
            said.append(
                f"train.init_from is not here; what is planned is the body that config.model describes: {error}"
            )
    if folder is not None and is_pretrained(folder):
        config = body_of(config, folder)
        said.append(f"the body is that of {source}, not the one that config.model describes")
    if config.model.vocab_size is None:
        asked, known = config.tokenizer, True
        if folder is not None:
            size = load_tokenizer(folder / "tokenizer").vocab_size
        elif asked.path:
            size = make_tokenizer(asked, lambda: ()).vocab_size
        else:
            known = asked.kind in ("bytes", "sentencepiece") and not source and "prepared:" not in config.data.train
            trained = asked.kind == "sentencepiece"
            size = asked.vocab_size if trained else ByteTokenizer(asked.num_sentinels).vocab_size
        if not known:
            said.append(f"the vocabulary is known once a run begins; here it counts {size:,} (set model.vocab_size)")
        config = config.replace(model={"vocab_size": size})
    return config, said


def abstract_experiment(config: Config, target: Target) -> Experiment:
    """The experiment on the target's devices, without its data.

    Raises:
      ConfigError: the config does not fit the devices.
    """
    layout = Layout.of(config.mesh, target.devices)
    check_strategy(config.train.strategy, layout.mesh)
    split = split_batch(config.train, layout.mesh)
    check_pipeline(config.model, split.rows_per_device, layout)
    tokenizer = ByteTokenizer(config.tokenizer.num_sentinels)
    config, _ = as_it_runs(config)
    labels = config.data.labels or tuple(map(str, range(config.model.num_classes)))
    resolved = config.replace(data={"labels": labels})
    objective = make_objective(resolved, tokenizer)
    experiment = Experiment(resolved, config, tokenizer, objective, Transformer(resolved.model), layout, split)
    experiment.attention_forms()  # or the error that says why not
    return experiment


def abstract_batch(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a global batch, as the objective makes them: seen in a batch of a few words."""
    config = experiment.config
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(_few_words(config, Path(folder)), record_fields(config))
        batches = make_batches(
            source, experiment.tokenizer, experiment.objective, config, train=False, seed=0, batch_size=1
        )
        row = next(batches)
    rows, sharding = config.train.global_batch_size, batch_sharding(experiment.mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype, sharding=sharding)
        for name, array in row.items()
    }


def compile_program(config: Config, target: Target) -> Program:
    """Compiles the train step of ``config`` for ``target``, if there is a compiler for it.

    Raises:
      ConfigError: the config does not fit the devices.
      LmxError: the compiler fails, for another reason than memory.
    """
    experiment = abstract_experiment(config, target)
    batch = abstract_batch(experiment)
    if target.lacks:  # such devices have no memory to name: what is offloaded is laid out as if it were not
        here = experiment.config.replace(optimizer={"offload": False})
        return Program(experiment, state_layout(dataclasses.replace(experiment, config=here)), batch, None, 0.0)
    state = state_layout(experiment)
    step = compiled_train_step(experiment, experiment.optimizer(), state)
    start, compiled, failed = time.perf_counter(), None, ""
    try:
        with quiet():
            compiled = step.lower(state, batch).compile()
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        failed = str(error)
        if not any(words in failed for words in OUT_OF_MEMORY):
            raise LmxError(f"the compiler for {target.name} failed: {failed.splitlines()[0]}") from error
    return Program(experiment, state, batch, compiled, time.perf_counter() - start, failed)


def num_bytes(tree: PyTree) -> int:
    """Bytes on one device of a tree of shapes with shardings; what is in the host's memory counts as nothing."""
    return sum(
        leaf.dtype.itemsize * _size(leaf)
        for leaf in jax.tree.leaves(tree)
        if getattr(leaf.sharding, "memory_kind", None) != "pinned_host"
    )


def boxed_params(experiment: Experiment) -> list[tuple[str, tuple[str | None, ...], tuple[int, ...], Any]]:
    """Every parameter: its name, the names of its dimensions, its shape, and the mesh axes of each dimension."""
    boxed, layout = experiment.abstract_params, experiment.layout
    specs = jax.tree.leaves(nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, jax.P))
    found = []
    for (path, leaf), names in zip(jax.tree.leaves_with_path(nn.meta.unbox(boxed)), specs, strict=True):
        names = all_names(names, leaf)
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        found.append((place, names, leaf.shape, layout.param_axes(names, leaf.shape)))
    return found


def _size(leaf: jax.ShapeDtypeStruct) -> int:
    size = 1
    for dim in leaf.sharding.shard_shape(leaf.shape):
        size *= dim
    return size


def _few_words(config: Config, folder: Path) -> str:
    """A source of the kind that the objective reads."""
    data = config.data
    if config.objective.name == "seq2seq":
        records = [{data.source_field: "a few words", data.target_field: "a few words"}]
    elif config.objective.name == "classification":
        records = [{data.text_field: "a few words", data.label_field: data.labels[0] if data.labels else 0}]
        records = [record | ({data.pair_field: "more"} if data.pair_field else {}) for record in records]
        if config.objective.task == "regression":
            records[0][data.label_field] = 1.0
    else:
        (folder / "words.txt").write_text("a few words, and then a few more of them\n" * 8)
        return f"text:{folder / 'words.txt'}"
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, records)))
    return f"jsonl:{folder / 'words.jsonl'}"
