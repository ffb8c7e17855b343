"""Copy a word, or write it backwards: the smallest tasks that need both stacks.

A modern encoder-decoder (pre-norm, RMSNorm, gated feed-forward) of 2 + 2 layers on random lower-case words of 3 to 12
letters, one a row. Held-out words are others than those trained on. The measure is exact match: the share of words
with every letter right.

Variants: `reverse` (the default), `copy`, and `tiny`, which is `copy` for 20 steps and only shows that everything
runs.
"""

from lmx.config import Config, Data, Model, Objective, Optimizer, Tokenizer, Train, config_dict
from lmx.errors import ConfigError, nearest

VARIANTS = {"reverse": ("reverse", 600), "copy": ("copy", 400), "tiny": ("copy", 20)}  # task and steps


def get_config(variant="reverse"):
    if variant not in VARIANTS:
        raise ConfigError(f"seq2seq has no variant {variant!r}{nearest(variant, VARIANTS)}")
    task, steps = VARIANTS[variant]
    return config_dict(
        Config(
            model=Model(
                architecture="encoder_decoder",
                heads=("lm",),
                num_layers=2,
                num_heads=4,
                embed_dim=128,
                mlp_dim=256,
                max_length=16,
                norm="rmsnorm",
                use_bias=False,
                activation="swiglu",
            ),
            objective=Objective(name="seq2seq"),
            data=Data(
                train=f"builtin:{task}[:99%]", eval=f"builtin:{task}[99%:]", length=16, target_length=16, packing=False
            ),
            tokenizer=Tokenizer(kind="characters"),
            optimizer=Optimizer(learning_rate=2e-3, warmup_steps=min(50, steps // 4), end_fraction=0.05, b2=0.98),
            train=Train(
                steps=steps,
                global_batch_size=64,
                log_every=max(1, min(20, steps // 4)),
                eval_every=max(1, steps // 4),
                checkpoint_every=max(1, steps // 2),
                samples=0,
            ),
        )
    )
