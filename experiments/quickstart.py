"""Quickstart: a small GPT on Python's own reference manual, on a laptop's CPU.

Nothing is downloaded: the text is in every Python's standard library. The model reads bytes, so there is no vocabulary
to learn first. It learns to spell, then words, then the manual's turns of phrase; it will not learn Python.

Variants: `default`, and `tiny`, which only shows that everything runs.
"""

from lmx.config import Config, Data, Expect, Model, Objective, Optimizer, Tokenizer, Train, config_dict
from lmx.errors import ConfigError, nearest

STEPS = {"default": 400, "tiny": 20}


def get_config(variant="default"):
    if variant not in STEPS:
        raise ConfigError(f"quickstart has no variant {variant!r}{nearest(variant, STEPS)}")
    steps = STEPS[variant]
    return config_dict(
        Config(
            model=Model(
                num_layers=4,
                num_heads=4,
                embed_dim=128,
                mlp_dim=512,
                max_length=256,
                position="rotary",
                norm="rmsnorm",
                use_bias=False,
                scale_residual_init=True,
            ),
            objective=Objective(name="causal"),
            data=Data(train="builtin:python_manual[:90%]", eval="builtin:python_manual[90%:]", length=128),
            tokenizer=Tokenizer(kind="bytes"),
            optimizer=Optimizer(learning_rate=3e-3, warmup_steps=min(50, steps // 4), b2=0.99, weight_decay=0.1),
            train=Train(
                steps=steps,
                global_batch_size=16,
                log_every=10,
                eval_every=max(1, steps // 4),
                checkpoint_every=max(1, steps // 2),
                sample_prompt="The statement ",
            ),
            expect=Expect(
                value=1.62 if variant == "default" else None,
                hardware="two x86 cores",
                minutes=2,
                source="docs/lab_notes.md (Python 3.13's manual)",
            ),
        )
    )
