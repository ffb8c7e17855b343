"""A GPT of characters on the works of Shakespeare: nanoGPT's two settings.

Source: https://github.com/karpathy/nanoGPT, README and config/train_shakespeare_char.py.

Variants:
  default  the README's setting for a laptop's CPU: 4 layers, 128 wide, 64 characters of context. The README has 1.88
           nats a character held out, in about 3 minutes.
  gpu      its setting for one GPU: 6 layers, 384 wide, 256 characters. The README has 1.4697 held out, in about 3
           minutes on an A100; that is the best evaluation of the run, which overfits afterwards.
  tiny     the default's model for 100 steps on the built-in text: nothing is downloaded.

The peak learning rate is 3e-3 where nanoGPT has 1e-3, which this setting learns faster with.
The held-out text is the last tenth, as in nanoGPT; TFDS calls its halves validation and test. nanoGPT draws windows at
random places, lmx goes through all rows in a fresh order each epoch. To train on a file of your own:
`--config.data.train="text:input.txt[:90%]" --config.data.eval="text:input.txt[90%:]"`.
"""

from lmx.config import Config, Data, Expect, Model, Optimizer, Tokenizer, Train, config_dict
from lmx.errors import ConfigError, nearest

LAPTOP = {"num_layers": 4, "num_heads": 4, "embed_dim": 128, "mlp_dim": 512, "max_length": 64, "dropout": 0.0}
GPU = {"num_layers": 6, "num_heads": 6, "embed_dim": 384, "mlp_dim": 1536, "max_length": 256, "dropout": 0.2}
SHAKESPEARE = {
    "train": "tfds:tiny_shakespeare@train",
    "eval": "0.5*tfds:tiny_shakespeare@validation + 0.5*tfds:tiny_shakespeare@test",
}
MANUAL = {"train": "builtin:python_manual[:90%]", "eval": "builtin:python_manual[90%:]"}
README = "nanoGPT's README, https://github.com/karpathy/nanoGPT"
VARIANTS = {  # model, data, steps, batch, expectation
    "default": (LAPTOP, SHAKESPEARE, 2000, 12, Expect(value=1.88, hardware="a laptop's CPU", minutes=3, source=README)),
    "gpu": (GPU, SHAKESPEARE, 5000, 64, Expect(value=1.4697, hardware="1 A100", minutes=3, source=README)),
    "tiny": (LAPTOP, MANUAL, 100, 12, Expect()),
}


def get_config(variant="default"):
    if variant not in VARIANTS:
        raise ConfigError(f"shakespeare_char has no variant {variant!r}{nearest(variant, VARIANTS)}")
    model, data, steps, batch, expect = VARIANTS[variant]
    return config_dict(
        Config(
            model=Model(
                **model,
                attention_dropout=model["dropout"],
                activation="gelu",
                use_bias=False,
                scale_residual_init=True,
            ),
            data=Data(**data, length=model["max_length"]),
            tokenizer=Tokenizer(kind="characters"),
            optimizer=Optimizer(
                learning_rate=3e-3 if variant != "gpu" else 1e-3,
                warmup_steps=min(100, steps // 10),
                end_fraction=0.1,
                b2=0.99,
                weight_decay=0.1,
                clip_norm=1.0,
            ),
            train=Train(
                steps=steps,
                global_batch_size=batch,
                eval_every=min(250, steps // 2),
                checkpoint_every=min(500, steps),
                sample_prompt="\n",
            ),
            expect=expect,
        )
    )
