"""BERT (Devlin et al. 2019, https://arxiv.org/abs/1810.04805): masked tokens and next sentences.

Variants:
  base   12 layers, 768 wide, 12 heads: 110M parameters (section 3).
  large  24 layers, 1024 wide, 16 heads: 340M parameters.
  tiny   2 layers, 128 wide, on the built-in text: trains on a laptop.

As published: held-out masked-token perplexity 3.99 (base) and 3.23 (large), Table 6; trained on 16 (base) and 64
(large) TPU chips, four days each (appendix A.2): 1M steps of 256 rows of 512 tokens.

Where this differs: the books of the paper's corpus are not available, so the text is Wikipedia alone and the expected
perplexity only a bearing; the vocabulary of 30,522 is a SentencePiece one trained on it; all steps have rows of 512
tokens, while the paper has 128 in the first 90% of them; masks are drawn afresh each epoch, while the paper has ten
fixed ones of each row; initial values are normal, not truncated at two standard deviations.
"""

import math

from lmx.config import Config, Data, Expect, Mesh, Model, Objective, Optimizer, Tokenizer, Train, config_dict
from lmx.errors import ConfigError, nearest

SIZES = {  # layers, width, heads
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
    "tiny": (2, 128, 2),
}
EXPECT = {
    "base": Expect(
        value=math.log(3.99), hardware="16 TPU chips (4 Cloud TPUs)", minutes=5760, source="Devlin et al. 2019, Table 6"
    ),
    "large": Expect(
        value=math.log(3.23),
        hardware="64 TPU chips (16 Cloud TPUs)",
        minutes=5760,
        source="Devlin et al. 2019, Table 6",
    ),
    "tiny": Expect(),
}


def get_config(variant="base"):
    if variant not in SIZES:
        raise ConfigError(f"bert has no variant {variant!r}{nearest(variant, SIZES)}")
    layers, width, heads = SIZES[variant]
    config = Config(
        model=Model(
            architecture="encoder",
            heads=("mlm", "classification"),
            vocab_size=30522,
            num_layers=layers,
            num_heads=heads,
            embed_dim=width,
            mlp_dim=4 * width,
            max_length=512,
            norm_position="post",
            norm_epsilon=1e-12,
            activation="gelu",
            num_token_types=2,
            embedding_norm=True,
            dropout=0.1,
            attention_dropout=0.1,
            dtype="bfloat16",
        ),
        objective=Objective(name="mlm", mask_rate=0.15, mask_split=(0.8, 0.1, 0.1), next_sentence=True),
        data=Data(train="tfds:wikipedia/20230601.en@train[:99%]", eval="tfds:wikipedia/20230601.en@train[99%:]"),
        tokenizer=Tokenizer(kind="sentencepiece", vocab_size=30522, lowercase=True),
        optimizer=Optimizer(
            learning_rate=1e-4,
            schedule="linear",
            warmup_steps=10_000,
            end_fraction=0.0,
            b1=0.9,
            b2=0.999,
            epsilon=1e-6,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        train=Train(
            steps=1_000_000, global_batch_size=256, log_every=100, eval_every=10_000, checkpoint_every=10_000, samples=0
        ),
        mesh=Mesh(on=("any: data=-1",)),  # a third of a billion parameters fit on any device
        expect=EXPECT[variant],
    )
    return config_dict(tiny(config) if variant == "tiny" else config)


def tiny(config):
    """The same on the built-in text, for a laptop."""
    return config.replace(
        model={"vocab_size": None, "max_length": 128, "dtype": "float32"},
        data={"train": "builtin:python_manual[:90%]", "eval": "builtin:python_manual[90%:]", "length": 128},
        tokenizer={"vocab_size": 2000},
        optimizer={"learning_rate": 1e-3, "warmup_steps": 50},
        train={"steps": 300, "global_batch_size": 16, "log_every": 10, "eval_every": 100, "checkpoint_every": 100},
    )
