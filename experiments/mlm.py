"""Masked language modelling in the textbook's form: every chosen token becomes the mask, and nothing else is predicted.

A post-norm encoder with learned positions, `H = LayerNorm(H + SelfAttention(H))`, then `H = LayerNorm(H + FFN(H))`, on
packed rows. For BERT itself, with its 80/10/10 split and next-sentence prediction, see `experiments/bert.py`.

Variants:
  base  BERT-base's body on Wikipedia, a vocabulary of 30,522: 1M steps, as many as BERT has.
  tiny  2 layers, 128 wide, rotary positions, on the built-in text: trains on a laptop.

There is no published figure for this form.
"""

from lmx.config import Config, Data, Model, Objective, Optimizer, Tokenizer, Train, config_dict
from lmx.errors import ConfigError, nearest

VARIANTS = ("base", "tiny")


def get_config(variant="tiny"):
    if variant not in VARIANTS:
        raise ConfigError(f"mlm has no variant {variant!r}{nearest(variant, VARIANTS)}")
    config = Config(
        model=Model(
            architecture="encoder",
            heads=("mlm",),
            vocab_size=30522,
            num_layers=12,
            num_heads=12,
            embed_dim=768,
            mlp_dim=3072,
            max_length=512,
            norm_position="post",
            embedding_norm=True,
            dropout=0.1,
            attention_dropout=0.1,
            dtype="bfloat16",
        ),
        objective=Objective(name="mlm", mask_rate=0.15, mask_split=(1.0, 0.0, 0.0)),
        data=Data(train="tfds:wikipedia/20230601.en@train[:99%]", eval="tfds:wikipedia/20230601.en@train[99%:]"),
        tokenizer=Tokenizer(kind="sentencepiece", vocab_size=30522),
        optimizer=Optimizer(
            learning_rate=1e-4, schedule="linear", warmup_steps=10_000, end_fraction=0.0, b2=0.999, weight_decay=0.01
        ),
        train=Train(
            steps=1_000_000, global_batch_size=256, log_every=100, eval_every=10_000, checkpoint_every=10_000, samples=0
        ),
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
            "max_length": 128,
            # Of so few steps, learned positions and dropout spend most on guessing by frequency (docs/lab_notes.md).
            "position": "rotary",
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "dtype": "float32",
        },
        data={"train": "builtin:python_manual[:90%]", "eval": "builtin:python_manual[90%:]", "length": 128},
        tokenizer={"vocab_size": 2000},
        optimizer={"learning_rate": 1e-3, "warmup_steps": 50, "b2": 0.98},
        train={"steps": 300, "global_batch_size": 16, "log_every": 10, "eval_every": 100, "checkpoint_every": 100},
    )
