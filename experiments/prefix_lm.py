"""A prefix language model: one decoder stack whose prefix sees itself in both directions.

Liu et al. 2018 (https://arxiv.org/abs/1801.10198), section 4.2.3; Raffel et al. 2020
(https://arxiv.org/abs/1910.10683), section 3.2 and figure 4.

Variants:
  base  the "prefix LM" of T5's comparison (section 3.2, Table 2, the rows with P parameters): T5-base's decoder without
        cross-attention, on C4. The paper reports downstream scores only.
  tiny  2 layers, 128 wide, bytes of the built-in text: trains on a laptop.
"""

from lmx.config import Config, Data, Eval, Model, Objective, Optimizer, Tokenizer, Train, config_dict
from lmx.errors import ConfigError, nearest

VARIANTS = ("base", "tiny")


def get_config(variant="tiny"):
    if variant not in VARIANTS:
        raise ConfigError(f"prefix_lm has no variant {variant!r}{nearest(variant, VARIANTS)}")
    config = Config(
        model=Model(
            architecture="decoder",
            heads=("lm",),
            vocab_size=32128,
            num_layers=12,
            num_heads=12,
            embed_dim=768,
            head_dim=64,
            mlp_dim=3072,
            norm="rmsnorm",
            norm_epsilon=1e-6,
            use_bias=False,
            position="relative",
            attention_scale="none",
            activation="relu",
            scale_logits=True,
            dropout=0.1,
            attention_dropout=0.1,
            mlp_dropout=0.1,
            final_dropout=0.1,
            initializer="fan_in",
            init_stddev=768**-0.5,
            embedding_stddev=1.0,
            dtype="bfloat16",
        ),
        objective=Objective(name="prefix_lm"),
        data=Data(train="tfds:c4/en@train", eval="tfds:c4/en@validation", length=512),
        tokenizer=Tokenizer(kind="sentencepiece", vocab_size=32000),
        optimizer=Optimizer(
            name="adafactor",
            learning_rate=0.01,
            schedule="inverse_sqrt",
            warmup_steps=10_000,
            weight_decay=0.0,
            clip_norm=0.0,
        ),
        train=Train(steps=2**19, global_batch_size=128, log_every=100, eval_every=10_000, checkpoint_every=10_000),
        eval=Eval(max_batches=100),
    )
    return config_dict(tiny(config) if variant == "tiny" else config)


def tiny(config):
    """The same on the built-in text, for a laptop."""
    return config.replace(
        model={
            "vocab_size": None,
            "num_layers": 2,
            "num_heads": 2,
            "embed_dim": 128,
            "mlp_dim": 512,
            "init_stddev": 128**-0.5,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "mlp_dropout": 0.0,
            "final_dropout": 0.0,
            "dtype": "float32",
        },
        data={"train": "builtin:python_manual[:90%]", "eval": "builtin:python_manual[90%:]", "length": 128},
        tokenizer={"kind": "bytes"},
        optimizer={"warmup_steps": 50},
        train={"steps": 300, "global_batch_size": 16, "log_every": 10, "eval_every": 100, "checkpoint_every": 100},
        eval={"max_batches": 0},
    )
