"""The original Transformer (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), English to German.

Variants:
  base  6 + 6 layers, 512 wide, 8 heads (Table 3).
  big   6 + 6 layers, 1024 wide, 16 heads, dropout 0.3.
  tiny  the base recipe, 2 + 2 layers, 128 wide, writing words backwards: trains on a laptop.

As published: perplexity a token on newstest2013 4.92 (base) and 4.33 (big), Table 3; 12 hours and 3.5 days on 8 P100
(section 5.2). Post-norm, sinusoids on embeddings scaled by sqrt(512), one table for both languages and the output,
label smoothing 0.1, Adam with b1 0.9, b2 0.98, epsilon 1e-9, and the learning rate of equation 3: its peak, at step
4000, is 1/sqrt(embed_dim * 4000). A batch is about 25,000 tokens of each language.

Where this differs: attention's projections have biases; the shared vocabulary of 37,000 is SentencePiece's BPE. With
it the models have 63 and 214 million parameters where Table 3 says 65 and 213. Sentence pairs longer than 512 tokens
are left out, and how many is printed.
"""

import math

from lmx.config import Config, Data, Expect, Model, Objective, Optimizer, Tokenizer, Train, config_dict
from lmx.errors import ConfigError, nearest

TABLE_3 = "Vaswani et al. 2017, Table 3"
SIZES = {  # layers of each stack, width, heads, dropout, steps, expectation
    "base": (
        (6, 512, 8, 0.1),
        100_000,
        Expect(value=math.log(4.92), hardware="8 P100", minutes=12 * 60, source=TABLE_3),
    ),
    "big": (
        (6, 1024, 16, 0.3),
        300_000,
        Expect(value=math.log(4.33), hardware="8 P100", minutes=84 * 60, source=TABLE_3),
    ),
    "tiny": ((2, 128, 4, 0.0), 1000, Expect()),
}


def get_config(variant="base"):
    if variant not in SIZES:
        raise ConfigError(f"transformer_wmt has no variant {variant!r}{nearest(variant, SIZES)}")
    (layers, width, heads, dropout), steps, expect = SIZES[variant]
    config = Config(
        model=Model(
            architecture="encoder_decoder",
            heads=("lm",),
            vocab_size=37000,
            num_layers=layers,
            num_heads=heads,
            embed_dim=width,
            mlp_dim=4 * width,
            norm_position="post",
            norm_epsilon=1e-6,
            position="sinusoidal",
            activation="relu",
            scale_embeddings=True,
            dropout=dropout,
            initializer="xavier",
            embedding_stddev=width**-0.5,
        ),
        objective=Objective(name="seq2seq", label_smoothing=0.1),
        data=Data(
            train="tfds:wmt14_translate/de-en@train",
            eval="tfds:wmt14_translate/de-en@validation",
            source_field="en",
            target_field="de",
            length=512,
            target_length=512,
            too_long="drop",
        ),
        tokenizer=Tokenizer(kind="sentencepiece", model_type="bpe", vocab_size=37000),
        optimizer=Optimizer(
            learning_rate=1 / math.sqrt(width * 4000),
            schedule="inverse_sqrt",
            warmup_steps=4000,
            b1=0.9,
            b2=0.98,
            epsilon=1e-9,
            weight_decay=0.0,
            clip_norm=0.0,
        ),
        train=Train(
            steps=steps, global_batch_size=48, log_every=100, eval_every=2000, checkpoint_every=2000, samples=0
        ),
        expect=expect,
    )
    return config_dict(tiny(config) if variant == "tiny" else config)


def tiny(config):
    """The same on random words to be written backwards, for a laptop."""
    return config.replace(
        model={"vocab_size": None},
        objective={"label_smoothing": 0.0},
        data={
            "train": "builtin:reverse[:99%]",
            "eval": "builtin:reverse[99%:]",
            "source_field": "source",
            "target_field": "target",
            "length": 16,
            "target_length": 16,
            "packing": False,
            "too_long": "error",
        },
        tokenizer={"kind": "characters"},
        optimizer={"learning_rate": 1 / math.sqrt(128 * 400), "warmup_steps": 400},
        train={"global_batch_size": 64, "log_every": 20, "eval_every": 250, "checkpoint_every": 500},
    )
