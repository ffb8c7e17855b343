"""Do the fields of a config agree with each other? Everything that needs no files and no devices."""

import typing

from lmx.errors import ConfigError

if typing.TYPE_CHECKING:
    from lmx.config import Config, Model

# What an objective needs of the model: the architecture (none: any) and a head.
NEEDS = {
    "mlm": ("encoder", "mlm"),
    "causal": ("decoder", "lm"),
    "prefix_lm": ("decoder", "lm"),
    "span_corruption": ("encoder_decoder", "lm"),
    "seq2seq": ("encoder_decoder", "lm"),
    "classification": (None, "classification"),
    "none": (None, None),
}


def check_together(config: "Config", periods: tuple[int, int]) -> None:
    """Raises :class:`ConfigError` for the first fields that do not fit each other.

    Args:
      config: its sections are checked one by one already.
      periods: layers after which the first stack repeats itself, and an encoder-decoder's decoder.
    """
    _check_widths(config.model)
    _check_layers(config.model, periods)
    _check_objective(config)
    _check_data(config)
    _check_mesh(config)


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise ConfigError(message)


def _check_widths(model: "Model") -> None:
    embed_dim, heads, kv_heads = model.embed_dim, model.num_heads, model.num_kv_heads or model.num_heads
    _require(
        model.head_dim is not None or embed_dim % heads == 0,
        f"model.embed_dim ({embed_dim}) is not divisible by model.num_heads ({heads}); change one of them, or set "
        "model.head_dim.",
    )
    _require(
        heads % kv_heads == 0,
        f"model.num_heads ({heads}) is not a multiple of model.num_kv_heads ({kv_heads}); each key/value head serves "
        "the same number of query heads.",
    )
    head_dim = model.head_dim or embed_dim // heads
    rotated = round(head_dim * model.rotary_fraction)
    _require(
        model.position != "rotary" or (rotated > 0 and rotated % 2 == 0),
        f"rotary positions rotate pairs, so the rotated width of a head must be even, not {rotated}; change "
        "model.embed_dim, model.num_heads, model.head_dim or model.rotary_fraction.",
    )
    _require(
        model.position != "sinusoidal" or embed_dim % 2 == 0,
        f"sinusoidal positions need an even model.embed_dim, not {embed_dim}.",
    )
    if model.position == "relative":
        _check_relative(model.relative_buckets, model.relative_max_distance)


def _check_relative(buckets: int, max_distance: int) -> None:
    _require(
        buckets >= 4 and buckets % 2 == 0,
        f"model.relative_buckets must be even and at least 4, not {buckets}: an encoder has half of them for each "
        "direction.",
    )
    _require(
        max_distance > buckets // 2,
        f"model.relative_max_distance ({max_distance}) must be more than half of model.relative_buckets ({buckets}), "
        "the distances that have a bucket of their own.",
    )


def _check_layers(model: "Model", periods: tuple[int, int]) -> None:
    windows = model.attention_windows
    _require(len(windows) > 0, "model.attention_windows is empty; (0,) is dense attention everywhere.")
    _require(min(windows, default=0) >= 0, f"model.attention_windows {windows} holds a negative window; 0 is dense.")
    two = model.architecture == "encoder_decoder"
    depths = {"num_layers": model.num_layers}
    if two:
        depths["num_decoder_layers"] = model.num_decoder_layers or model.num_layers
    for (name, layers), period in zip(depths.items(), periods, strict=False):
        _require(
            not model.scan_layers or layers % period == 0,
            f"model.{name} ({layers}) is not a multiple of {period}, the period in which layers alternate "
            "(model.attention_windows, model.experts.every); change it, or set model.scan_layers=False.",
        )
    experts = model.experts
    if experts.num_experts:
        _require(
            experts.top_k <= experts.num_experts,
            f"model.experts.top_k ({experts.top_k}) is more than model.experts.num_experts ({experts.num_experts}).",
        )
        every = min(experts.every, (two and experts.decoder_every) or experts.every)
        _require(
            experts.first is None or experts.first < every,
            f"model.experts.first ({experts.first}) must be below model.experts.every ({every}): layer "
            f"{experts.first} is sparse, and every {every}th after it.",
        )


def _check_objective(config: "Config") -> None:
    model, objective, data = config.model, config.objective, config.data
    parts = objective.mask_split
    _require(
        len(parts) == 3 and abs(sum(parts) - 1) < 1e-6 and min(parts) >= 0,
        f"objective.mask_split must be three parts that sum to 1, not {parts}.",
    )
    architecture, head = NEEDS[objective.name]
    _require(
        architecture in (None, model.architecture),
        f"objective {objective.name!r} needs model.architecture={architecture!r}, not {model.architecture!r}.",
    )
    _require(
        head is None or head in model.heads,
        f"objective {objective.name!r} needs {head!r} in model.heads, not {model.heads}.",
    )
    _require(
        not objective.next_sentence
        or ("classification" in model.heads and model.num_classes == 2 and model.num_token_types >= 2),
        "objective.next_sentence needs 'classification' in model.heads, model.num_classes=2 and "
        f"model.num_token_types=2; found {model.heads}, {model.num_classes} and {model.num_token_types}.",
    )
    classifies = objective.name == "classification"
    _require(
        not (classifies and objective.task == "regression") or model.num_classes == 1,
        f"regression needs model.num_classes=1, not {model.num_classes}.",
    )
    _require(
        not (classifies and model.architecture == "decoder") or model.pooling != "first",
        f"classification reads the state of one token (model.pooling={model.pooling!r}), and a decoder's first token "
        "sees no other: set model.pooling='last' or 'mean'.",
    )
    _require(
        model.position != "learned" or data.length <= model.max_length,
        f"data.length ({data.length}) is more than model.max_length ({model.max_length}), the positions that the "
        "learned table holds.",
    )


def _check_data(config: "Config") -> None:
    data, name = config.data, config.objective.name
    _require(
        data.mixing == "proportional" or (data.mixing_limit, data.mixing_temperature) == (0, 1.0),
        "data.mixing_limit and data.mixing_temperature are for shares by size: set data.mixing='proportional' too, or "
        "leave them out.",
    )
    _require(
        data.too_long != "split" or name != "seq2seq",
        "data.too_long='split' cannot split a target together with its source; use 'error', 'drop' or 'cut', or raise "
        "data.length and data.target_length.",
    )
    _require(
        data.too_long != "split" or name != "classification" or not data.pair_field,
        "data.too_long='split' is for single texts, and data.pair_field names a second one; use 'error', 'drop' or "
        "'cut', or raise data.length.",
    )


def _check_mesh(config: "Config") -> None:
    sizes = {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "tensor", "sequence", "expert", "stage")}
    _require(
        list(sizes.values()).count(-1) <= 1,
        f"only one axis of config.mesh may be -1 (what is left), not all of {sizes}.",
    )
    _require(0 not in sizes.values(), f"an axis of config.mesh is 0 ({sizes}); the smallest size is 1.")
