"""T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683): the decoder writes what sentinels stand for.

Variants:
  small, base, large, 3b, 11b  the released sizes (section 3.7): 60, 220 and 770 million, 3 and 11 billion parameters.
  tiny                         2 + 2 layers, 128 wide, bytes of the built-in text: trains on a laptop.

The model is the first release's: ReLU, RMSNorm without biases, relative positions, one table for all embeddings. The
schedule is the baseline's (sections 3.1.2 to 3.1.4): C4, 2^19 steps of 128 rows of 512 tokens, Adafactor at
1/sqrt(max(step, 10^4)), 15% of the tokens in spans of 3 on average. (The released checkpoints have 1M steps of 2,048
rows, with supervised tasks mixed in.) The paper reports downstream scores and no pre-training loss; no value is
claimed.

Where this differs: the learning rate rises linearly over the first 10^4 steps, where the paper's is constant at 0.01;
the vocabulary of 32,000 and 100 sentinels is trained on C4's English alone. The output layer has 32,128 rows, as the
checkpoints do.
"""

from lmx.config import Config, Data, Eval, Mesh, Model, Objective, Optimizer, Tokenizer, Train, config_dict
from lmx.errors import ConfigError, nearest

SIZES = {  # layers of each stack, width, heads, width of a head, width of the feed-forward
    "small": (6, 512, 8, 64, 2048),
    "base": (12, 768, 12, 64, 3072),
    "large": (24, 1024, 16, 64, 4096),
    "3b": (24, 1024, 32, 128, 16384),
    "11b": (24, 1024, 128, 128, 65536),
    "tiny": (2, 128, 4, 32, 512),
}
MESHES = {"3b": ("any: fsdp=-1",), "11b": ("any: fsdp=-1", "h100: fsdp=-1, tensor=8")}  # by kind of device


def get_config(variant="base"):
    if variant not in SIZES:
        raise ConfigError(f"t5 has no variant {variant!r}{nearest(variant, SIZES)}")
    layers, width, heads, head_dim, mlp_dim = SIZES[variant]
    config = Config(
        model=Model(
            architecture="encoder_decoder",
            heads=("lm",),
            vocab_size=32128,
            num_layers=layers,
            num_heads=heads,
            embed_dim=width,
            head_dim=head_dim,
            mlp_dim=mlp_dim,
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
            init_stddev=width**-0.5,
            embedding_stddev=1.0,
            dtype="bfloat16",
            remat="full" if variant in MESHES else "none",
        ),
        objective=Objective(name="span_corruption", mask_rate=0.15, mean_span_length=3.0),
        data=Data(train="tfds:c4/en@train", eval="tfds:c4/en@validation", length=512),
        tokenizer=Tokenizer(kind="sentencepiece", vocab_size=32100, num_sentinels=100),
        optimizer=Optimizer(
            name="adafactor",
            learning_rate=0.01,
            schedule="inverse_sqrt",
            warmup_steps=10_000,
            weight_decay=0.0,
            clip_norm=0.0,
        ),
        train=Train(
            steps=2**19,
            global_batch_size=128,
            max_rows_per_device=32,
            log_every=100,
            eval_every=5000,
            checkpoint_every=5000,
            samples=0,
        ),
        mesh=Mesh(on=MESHES.get(variant, ("any: data=-1",))),
        eval=Eval(max_batches=100),
    )
    return config_dict(tiny(config) if variant == "tiny" else config)


def tiny(config):
    """The same on the built-in text, for a laptop."""
    return config.replace(
        model={
            "vocab_size": None,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "mlp_dropout": 0.0,
            "final_dropout": 0.0,
            "dtype": "float32",
        },
        data={"train": "builtin:python_manual[:90%]", "eval": "builtin:python_manual[90%:]", "length": 128},
        tokenizer={"kind": "bytes"},
        optimizer={"warmup_steps": 50},
        train={
            "steps": 300,
            "global_batch_size": 16,
            "max_rows_per_device": None,
            "log_every": 10,
            "eval_every": 100,
            "checkpoint_every": 100,
        },
        eval={"max_batches": 0},
    )
