"""Switch Transformer (Fedus et al. 2021, https://arxiv.org/abs/2101.03961): T5 with top-1 experts in its feed-forward.

Variants:
  base_8 … base_256  T5-base with 8, 16, 32, 64, 128 or 256 experts in every other layer of both stacks (section 2);
                     base_128 is Table 9's Switch-Base, 7 billion parameters.
  large_128          Switch-Large of Table 9, 26 billion: T5-large with 128 experts.
  xxl_128            Switch-XXL of Table 9, 395 billion, with the gated feed-forward.
  c_2048             Switch-C of Table 9, 1.6 trillion: 2,048 experts in every layer.
  tiny               2 + 2 layers, 128 wide, 4 experts, bytes of the built-in text: trains on a laptop.

As published, all on C4 with 2^20 tokens a step: negative log-perplexity -1.553 of Switch-Base with 128 experts and
capacity factor 1.25 after 100k steps, on 32 TPUv3 cores (Table 1); after 500k steps -1.177 (Large), -1.008 (XXL) and
-1.043 (C) (Table 9). From the paper: load-balance weight 0.01, jitter 0.01, initial variance scaled by 0.1 (section
2.4), router in float32.

Where this differs from Table 9: its rows do not all add up to their own parameter counts. XXL reaches 395 billion
with the 128 experts of the released checkpoint, not with the 64 of the table; Large comes to 26 billion with the
plain feed-forward of 4,096 of the released checkpoint, and to 27 with the gated one of 2,816. All follow the
checkpoints; so Base has their plain feed-forward of 3,072 too, where the table has a gated one of 2,048. The learning
rate is T5's (see `experiments/t5.py`), and dropout is off in pre-training, where no text is seen twice.
"""

from lmx.config import (
    Config,
    Data,
    Eval,
    Expect,
    Experts,
    Mesh,
    Model,
    Objective,
    Optimizer,
    Tokenizer,
    Train,
    config_dict,
)
from lmx.errors import ConfigError, nearest

BASE = (12, 768, 12, 3072, "relu")
SIZES = {  # layers of each stack, width, heads, width of the feed-forward, its activation; experts, every n-th layer
    **{f"base_{experts}": (*BASE, experts, 2) for experts in (8, 16, 32, 64, 128, 256)},
    "large_128": (24, 1024, 16, 4096, "relu", 128, 2),
    "xxl_128": (24, 4096, 64, 10240, "geglu", 128, 2),
    "c_2048": (15, 2080, 32, 6144, "relu", 2048, 1),
    "tiny": (2, 128, 2, 512, "relu", 4, 2),
}
EXPECT = {
    "base_128": Expect(value=1.553, hardware="32 TPUv3 cores", source="Fedus et al. 2021, Table 1"),
    "large_128": Expect(value=1.177, source="Fedus et al. 2021, Table 9"),
    "xxl_128": Expect(value=1.008, source="Fedus et al. 2021, Table 9"),
    "c_2048": Expect(value=1.043, source="Fedus et al. 2021, Table 9"),
}
MESHES = {  # by kind of device; a node of GPUs has eight
    **{f"base_{experts}": (f"any: data=-1, expert={min(experts, 8)}",) for experts in (8, 16, 32, 64, 128, 256)},
    "large_128": ("any: fsdp=-1, expert=16", "h100: fsdp=-1, expert=8"),
    "xxl_128": ("any: fsdp=-1, expert=16, tensor=8", "h100: fsdp=-1, expert=8, tensor=8"),
    "c_2048": ("any: fsdp=-1, expert=64",),
}


def get_config(variant="base_8"):
    if variant not in SIZES:
        raise ConfigError(f"switch has no variant {variant!r}{nearest(variant, SIZES)}")
    layers, width, heads, mlp_dim, activation, num_experts, every = SIZES[variant]
    config = Config(
        model=Model(
            architecture="encoder_decoder",
            heads=("lm",),
            vocab_size=32128,
            num_layers=layers,
            num_heads=heads,
            embed_dim=width,
            head_dim=64,
            mlp_dim=mlp_dim,
            norm="rmsnorm",
            norm_epsilon=1e-6,
            use_bias=False,
            position="relative",
            attention_scale="none",
            activation=activation,
            experts=Experts(
                num_experts=num_experts,
                every=every,
                capacity_factor=1.25,
                eval_capacity_factor=2.0,
                load_balance_weight=0.01,
                jitter=0.01,
            ),
            scale_logits=True,
            initializer="fan_in",
            init_scale=0.1,
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
            steps=100_000 if variant.startswith("base") else 500_000,
            global_batch_size=2048,
            max_rows_per_device=32,
            log_every=100,
            eval_every=5000,
            checkpoint_every=5000,
            samples=0,
        ),
        mesh=Mesh(on=MESHES.get(variant, ("any: data=-1",))),
        eval=Eval(batch_size=256, max_batches=100),
        expect=EXPECT.get(variant, Expect()),
    )
    return config_dict(tiny(config) if variant == "tiny" else config)


def tiny(config):
    """The same on the built-in text, for a laptop."""
    return config.replace(
        model={"vocab_size": None, "dtype": "float32"},
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
        eval={"batch_size": None, "max_batches": 0},
    )
