"""From a config to everything a run holds: text, tokenizer, objective, model, mesh. Nothing is written here."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax
from rich.console import Console

from lmx.config import Config, to_dict
from lmx.errors import ConfigError
from lmx.interop.adapters import is_adapter
from lmx.interop.opening import body_of, locate
from lmx.interop.pretrained import is_pretrained
from lmx.kernels import eight_bits
from lmx.kernels.attention import Choice
from lmx.models.attention import attention_form
from lmx.models.experts import expert_form
from lmx.models.flops import forward_flops
from lmx.models.heads import num_params
from lmx.models.transformer import Transformer, init_params
from lmx.objectives import Objective, make_objective
from lmx.parallel.compile import check_strategy
from lmx.parallel.mesh import BatchSplit, batch_shards, split_batch
from lmx.parallel.pipeline import check_pipeline
from lmx.parallel.processes import host_share
from lmx.parallel.sharding import Layout, use_layout
from lmx.paths import user_path
from lmx.text.corpora import Source, open_source, source_names, split_mixture
from lmx.text.lengths import fitted_records
from lmx.text.mixing import mixing_shares
from lmx.text.pipeline import example_counts, make_batches
from lmx.text.prepared import prepared_tokenizer
from lmx.text.published import PublishedTokenizer
from lmx.text.tfds_fields import tfds_fields
from lmx.text.tokenizers import load_tokenizer, make_tokenizer
from lmx.training.optimizers import make_optimizer, trainable
from lmx.training.workdir import read_config


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config with all that follows from it.

    Attributes:
      config: with what was read off the data filled in (``model.vocab_size``, ``data.labels``).
      asked: as it was given.
      layout: the devices, and what goes where on them.
      split: how the global batch is computed on them.
      sources: corpora that are open, by what they were asked for as; their tokens are remembered with them.
    """

    config: Config
    asked: Config
    tokenizer: Any
    objective: Objective
    model: Transformer
    layout: Layout
    split: BatchSplit
    sources: dict[str, Source] = dataclasses.field(default_factory=dict)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices."""
        return self.layout.mesh

    def init_params(self, key: jax.Array) -> Any:
        """Fresh parameters, boxed with the logical names of their axes."""
        return init_params(self.model, key)

    @functools.cached_property
    def abstract_params(self) -> Any:
        """Shapes of all parameters, boxed like :meth:`init_params`; computes nothing."""
        return jax.eval_shape(self.init_params, jax.random.key(0))

    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer for this model's parameters."""
        shapes = nn.meta.unbox(self.abstract_params)
        return make_optimizer(self.config.optimizer, self.config.train.steps, shapes, self.config.model.lora)

    def trainable(self) -> Any:
        """For each parameter whether it is trained."""
        return trainable(self.config.optimizer, nn.meta.unbox(self.abstract_params), self.config.model.lora)

    def num_params(self) -> tuple[int, int]:
        """Parameters in all, and those that are trained."""
        params = nn.meta.unbox(self.abstract_params)
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(self.trainable()), strict=True)
        return num_params(params), num_params([leaf for leaf, on in pairs if on])

    def attention_forms(self) -> list[Choice]:
        """The forms of attention that rows are computed by, and why not by faster ones.

        Raises:
          ConfigError: ``model.attention`` asks for one that cannot be had.
        """
        rows = self.split.rows_per_device * batch_shards(self.mesh)
        read = [(length, None) for name, length in self.objective.lengths.items() if name.endswith("tokens")]
        if self.config.model.architecture == "encoder_decoder":
            read.append((self.objective.lengths["decoder_tokens"], self.objective.lengths["encoder_tokens"]))
        has_prefix = self.config.objective.name == "prefix_lm"
        with use_layout(self.layout):
            forms = [attention_form(self.config.model, rows, *lengths, has_prefix) for lengths in read]
        return list(dict.fromkeys(forms))

    def forms(self) -> dict[str, str]:
        """What was chosen for the devices, for a header: forms of attention, and that of experts if there are any."""
        lines = {"attention": "; ".join(map(str, self.attention_forms()))}
        if self.config.model.experts.num_experts:
            with use_layout(self.layout):
                lines["experts"] = str(expert_form(self.config.model))
        return lines

    def row_tokens_and_flops(self) -> tuple[int, float]:
        """Tokens of a row, of both stacks where there are two, and FLOPs of its forward pass."""
        lengths, predictions = self.objective.lengths, self.objective.num_predictions
        source, target = lengths.get("encoder_tokens", 0), lengths.get("decoder_tokens") or lengths["tokens"]
        return source + target, forward_flops(self.config.model, target, source, predictions)

    def train_batches(self) -> Iterator[dict]:
        """This host's part of the training batches, for ever."""
        source = self._source(self.config.data.train)
        return self._batches(source, self.config.train.global_batch_size, train=True)

    def eval_batches(self, source: str | None = None) -> Iterator[dict]:
        """This host's part of the held-out batches, each row once; of ``data.eval`` or of another source."""
        return self._eval_batches(self._source(source or self.config.data.eval))

    def eval_batches_by_source(self, source: str | None = None) -> dict[str, Iterator[dict]]:
        """:meth:`eval_batches` of each part of a mixture, or of the one source, by its short name."""
        spec = source or self.config.data.eval
        parts = self._source(spec).sources
        return dict(zip(source_names(spec), map(self._eval_batches, parts), strict=True))

    def describe_data(self) -> list[str]:
        """What is known of the data that is open, a line each: shares or epochs, and records that are too long."""
        lines, data, train = [], self.config.data, self.config.train
        if data.train in self.sources:
            source = self.sources[data.train]
            counts = example_counts(source, self.tokenizer, self.objective, self.config)
            if self.objective.sources:
                shares = zip(self.objective.sources, mixing_shares(source, counts, data), counts, strict=True)
                lines += [f"{name}: {float(part):.2%} of training, {count:,} examples" for name, part, count in shares]
            elif not (self.objective.packable and data.packing):
                epochs = train.steps * train.global_batch_size / sum(counts)
                lines.append(f"{sum(counts):,} examples; {train.steps:,} steps are {epochs:.3g} epochs")
        if self.objective.cut is None and data.too_long != "error":
            parts = [part for source in self.sources.values() for part in source.sources]
            lines += filter(None, (fitted_records(part, self.objective, data.too_long).note for part in parts))
        return lines

    def _source(self, spec: str) -> Source:
        if spec not in self.sources:
            self.sources[spec] = open_source(spec, record_fields(self.config), self.config.data.tasks)
        return self.sources[spec]

    def _eval_batches(self, source: Source) -> Iterator[dict]:
        shards = batch_shards(self.mesh) * (self.layout.stage_microbatches or self.mesh.shape["stage"])
        rows = self.config.eval.batch_size or self.config.train.global_batch_size
        return self._batches(source, -(-rows // shards) * shards, train=False)

    def _batches(self, source: Source, rows: int, train: bool) -> Iterator[dict]:
        part, parts = host_share(self.mesh)
        return make_batches(
            source,
            self.tokenizer,
            self.objective,
            self.config,
            train=train,
            seed=self.config.seed,
            batch_size=rows // parts,
            process_index=part,
            process_count=parts,
        )


def build(asked: Config, workdir: Path, console: Console, devices: Any = None) -> Experiment:
    """Builds the experiment, with the cheap checks first.

    The tokenizer is the run's if it has been started, else that of ``train.init_from``, else what ``tokenizer`` says; a
    prepared corpus must have been made with it.

    Raises:
      LmxError: the config does not fit the devices, the data or the tokenizer.
    """
    layout = Layout.of(asked.mesh, devices)
    check_strategy(asked.train.strategy, layout.mesh)
    split = split_batch(asked.train, layout.mesh)
    config = with_pairs(asked)
    tokenizer = _tokenizer(config, workdir, console)
    config = resolve(_with_body(config, workdir, console), tokenizer)
    check_pipeline(config.model, split.rows_per_device, layout)
    objective = make_objective(config, tokenizer)
    experiment = Experiment(config, asked, tokenizer, objective, Transformer(config.model), layout, split)
    experiment.attention_forms()
    if config.model.products != "dtype":
        eight_bits.library()
    return experiment


def resolve(config: Config, tokenizer: Any) -> Config:
    """Fills in what the data decides: the vocabulary's size and the names of the classes.

    Raises:
      ConfigError: ``model.vocab_size`` is smaller than the tokenizer's, or the classes are more or fewer than
        ``model.num_classes``.
    """
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({vocab_size}) is smaller than the tokenizer's vocabulary ({tokenizer.vocab_size}); set "
            f"model.vocab_size to {tokenizer.vocab_size} or more, or leave it out."
        )
    labels = config.data.labels
    if config.objective.name == "classification" and config.objective.task == "classification":
        labels = labels or _labels(config)
        if len(labels) != config.model.num_classes:
            raise ConfigError(
                f"{config.data.train} has {len(labels)} classes ({', '.join(labels)}), but model.num_classes is "
                f"{config.model.num_classes}; set it to {len(labels)}, or name the classes in data.labels."
            )
    return config.replace(model={"vocab_size": vocab_size}, data={"labels": labels})


def with_pairs(config: Config) -> Config:
    """The config with ``data.pair_field`` where a classifier is to read well-known pairs, and no field is named.

    Raises:
      ConfigError: some sources of a mixture hold pairs and others do not.
    """
    data = config.data
    if config.objective.name != "classification" or data.pair_field or data.text_field != "text":
        return config
    kinds = {"pair" in tfds_fields(part.removeprefix("tfds:")) for _, part in split_mixture(data.train)}
    if len(kinds) > 1:
        raise ConfigError(
            f"data.train mixes pairs of texts and single texts ({data.train}), and a classifier reads one kind; name "
            "the fields in data.text_field and data.pair_field, or leave some out."
        )
    return config.replace(data={"pair_field": "pair"}) if kinds == {True} else config


def record_fields(config: Config) -> tuple[str, ...]:
    """The fields that every record of the sources must have."""
    data = config.data
    if config.objective.name == "seq2seq":
        return (data.source_field, data.target_field)
    if config.objective.name == "classification":
        return tuple(filter(None, (data.text_field, data.pair_field, data.label_field)))
    return (data.text_field,)


def _labels(config: Config) -> tuple[str, ...]:
    """The classes of the training data: as the source names them, or those found, numbers by value, names by the
    alphabet."""
    source = open_source(config.data.train, record_fields(config), config.data.tasks)
    names = source.class_names.get(config.data.label_field, ())
    if names and not any(name.lstrip("-").isdigit() for name in names):  # digits could be taken for indices
        return names
    found = {source[i][config.data.label_field] for i in range(len(source))}
    return tuple(str(label) for label in sorted(found, key=lambda x: (isinstance(x, str), x)))


def _with_body(config: Config, workdir: Path, console: Console) -> Config:
    """The config with the model's body as the published checkpoint has it that ``train.init_from`` names, if any."""
    source = config.train.init_from
    if not source or (user_path(source) / "checkpoints").is_dir():
        return config
    if (workdir / "config.json").is_file():  # the run knows; the checkpoint may be gone
        started = read_config(workdir).model
        return config.replace(
            model=to_dict(config)["model"]
            | dataclasses.asdict(started)
            | {"attention": config.model.attention, "remat": config.model.remat}
        )
    folder = _init_folder(source)
    if not is_pretrained(folder):
        return config
    console.print(f"[bold]model[/] of {source} (the body that config.model describes is not used)", soft_wrap=True)
    return body_of(config, folder)


def _init_folder(source: str) -> Path:
    """Where ``train.init_from`` is."""
    folder = locate(source)
    if is_adapter(folder):
        raise ConfigError(
            f"train.init_from={source!r} holds adapters alone; merge them into their base first: `lmx convert {source} "
            "DST --format hf`."
        )
    return folder


def _tokenizer(config: Config, workdir: Path, console: Console) -> Any:
    if (workdir / "config.json").is_file():
        return load_tokenizer(workdir / "tokenizer")
    if config.train.init_from:
        source = _init_folder(config.train.init_from)
        console.print(f"[bold]tokenizer[/] of {config.train.init_from} (config.tokenizer is not used)", soft_wrap=True)
        return PublishedTokenizer.open(source) if is_pretrained(source) else load_tokenizer(source / "tokenizer")
    if "prepared:" in config.data.train:
        sources = open_source(config.data.train, record_fields(config)).sources
        for prepared in filter(None, (source.prepared for source in sources)):
            return prepared_tokenizer(prepared, config.tokenizer)
    return make_tokenizer(config.tokenizer, _texts(config))


def _texts(config: Config) -> Callable[[], Iterator[str]]:
    """The training texts, for a tokenizer that is trained on them."""
    fields = record_fields(config)
    names = [name for name in fields if name != config.data.label_field]

    def texts() -> Iterator[str]:
        source = open_source(config.data.train, fields, config.data.tasks)
        for i in range(len(source)):
            record = source[i]
            yield from (record[name] for name in names)

    return texts
