"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): a pre-norm decoder.

Variants:
  124m, 355m, 774m, 1558m  the four sizes, by the parameters of the released checkpoints: 12, 24, 36 and 48 layers,
                           768, 1024, 1280 and 1600 wide (Table 2, whose own counts are too low).
  tiny                     2 layers, 128 wide, bytes of the built-in text: trains on a laptop.

The paper gives the batch (512 rows of 1,024 tokens) and neither learning rates nor steps. Steps, batch and learning
rate of 124m are nanoGPT's reproduction (https://github.com/karpathy/nanoGPT, config/train_gpt2.py), whose README
reports 2.85 nats a token held out on OpenWebText after four days on 8 A100; the learning rates of the larger ones are
those of GPT-3's models of that size (Brown et al. 2020, Table 2.1).

WebText was never released. The text here is C4's part that comes from the sites of OpenWebText, with a BPE vocabulary
of 50,257 trained on it, so the loss is not comparable with that figure and no value is claimed. With OpenWebText at
hand: `--config.data.train=jsonl:openwebtext.jsonl[:99%]`. Positions start at the same standard deviation as tokens,
0.02, where GPT-2's code has 0.01.
"""

from lmx.config import Config, Data, Eval, Mesh, Model, Optimizer, Tokenizer, Train, config_dict
from lmx.errors import ConfigError, nearest

SIZES = {  # layers, width, heads, learning rate, rows a device computes at once
    "124m": (12, 768, 12, 6e-4, 16),
    "355m": (24, 1024, 16, 3e-4, 8),
    "774m": (36, 1280, 20, 2.5e-4, 8),
    "1558m": (48, 1600, 25, 2e-4, 4),
    "tiny": (2, 128, 4, 1e-3, None),
}
MESHES = {  # by kind of device; the smaller ones are replicated
    "774m": ("any: fsdp=-1",),
    "1558m": ("any: fsdp=-1",),
}


def get_config(variant="124m"):
    if variant not in SIZES:
        raise ConfigError(f"gpt2 has no variant {variant!r}{nearest(variant, SIZES)}")
    layers, width, heads, learning_rate, rows = SIZES[variant]
    config = Config(
        model=Model(
            vocab_size=50257,
            num_layers=layers,
            num_heads=heads,
            embed_dim=width,
            mlp_dim=4 * width,
            max_length=1024,
            activation="gelu_tanh",
            scale_residual_init=True,
            dtype="bfloat16",
            remat="full" if variant in MESHES else "none",
        ),
        data=Data(train="tfds:c4/webtextlike@train", eval="tfds:c4/webtextlike@validation", length=1024),
        tokenizer=Tokenizer(kind="sentencepiece", model_type="bpe", vocab_size=50257),
        optimizer=Optimizer(
            learning_rate=learning_rate, warmup_steps=2000, end_fraction=0.1, b2=0.95, weight_decay=0.1, clip_norm=1.0
        ),
        train=Train(
            steps=600_000,
            global_batch_size=480,
            max_rows_per_device=rows,
            log_every=10,
            eval_every=2000,
            checkpoint_every=2000,
        ),
        mesh=Mesh(on=MESHES.get(variant, ("any: data=-1",))),
        eval=Eval(max_batches=50),
    )
    return config_dict(tiny(config) if variant == "tiny" else config)


def tiny(config):
    """The same on the built-in text, for a laptop."""
    return config.replace(
        model={"vocab_size": None, "max_length": 256, "dtype": "float32"},
        data={"train": "builtin:python_manual[:90%]", "eval": "builtin:python_manual[90%:]", "length": 128},
        tokenizer={"kind": "bytes"},
        optimizer={"warmup_steps": 50},
        train={
            "steps": 300,
            "global_batch_size": 16,
            "eval_every": 100,
            "checkpoint_every": 100,
            "sample_prompt": "The statement ",
        },
        eval={"max_batches": 0},
    )
