"""GPT-3 (Brown et al. 2020, https://arxiv.org/abs/2005.14165): GPT-2 with alternating dense and banded attention.

Variants:
  125m, 350m, 760m, 1.3b, 2.7b, 6.7b, 13b, 175b  the models of Table 2.1, with its batch sizes (tokens in rows of
                                                 2,048) and learning rates.
  tiny                                           4 layers, 128 wide, bytes of the built-in text: trains on a laptop.

From appendix B: Adam with b1 0.9, b2 0.95, epsilon 1e-8; gradients clipped to norm 1; weight decay 0.1; linear
warm-up over 375 million tokens, cosine decay to a tenth over 260 billion, then on at a tenth to 300 billion. The
paper lets the batch grow to its full size over the first 4 to 12 billion tokens; here it is full from the start.

Two entries of Table 2.1 contradict themselves and are mended: 1.3b with 24 heads of 128 is not 2,048 wide (and would
not have 1.3 billion parameters), so it has 16; 13b is 5,140 wide in the table and 40 heads of 128 make 5,120. The
paper says that banded layers are as in the Sparse Transformer, not how wide the band is: it is 128 tokens here, a
guess.

Losses are published as curves only (figure 3.1), on a corpus that was not released; no value is claimed. The text is
C4.
"""

from lmx.config import Config, Data, Eval, Mesh, Model, Optimizer, Tokenizer, Train, config_dict
from lmx.errors import ConfigError, nearest

LENGTH = 2048
SIZES = {  # layers, width, heads, rows a step (0.5M, 1M, 2M and 3.2M tokens), learning rate
    "125m": (12, 768, 12, 256, 6.0e-4),
    "350m": (24, 1024, 16, 256, 3.0e-4),
    "760m": (24, 1536, 16, 256, 2.5e-4),
    "1.3b": (24, 2048, 16, 512, 2.0e-4),
    "2.7b": (32, 2560, 32, 512, 1.6e-4),
    "6.7b": (32, 4096, 32, 1024, 1.2e-4),
    "13b": (40, 5120, 40, 1024, 1.0e-4),
    "175b": (96, 12288, 96, 1600, 0.6e-4),
    "tiny": (4, 128, 4, 16, 1e-3),
}
MESHES = {  # by kind of device, a node of GPUs has eight; the smaller ones are replicated
    "1.3b": ("any: fsdp=-1",),
    "2.7b": ("any: fsdp=-1", "v6e: fsdp=-1"),
    "6.7b": ("any: fsdp=-1", "v6e: fsdp=-1, tensor=2"),
    "13b": ("any: fsdp=-1", "v6e: fsdp=-1, tensor=4", "h100: fsdp=-1, tensor=2"),
    "175b": ("any: fsdp=-1, tensor=16", "h100: fsdp=-1, tensor=8"),
}


def get_config(variant="125m"):
    if variant not in SIZES:
        raise ConfigError(f"gpt3 has no variant {variant!r}{nearest(variant, SIZES)}")
    layers, width, heads, rows, learning_rate = SIZES[variant]
    tokens = rows * LENGTH
    config = Config(
        model=Model(
            vocab_size=50257,
            num_layers=layers,
            num_heads=heads,
            embed_dim=width,
            mlp_dim=4 * width,
            max_length=LENGTH,
            attention_windows=(0, 128),
            activation="gelu_tanh",
            scale_residual_init=True,
            dtype="bfloat16",
            remat="full" if variant in MESHES else "none",
        ),
        data=Data(train="tfds:c4/en@train", eval="tfds:c4/en@validation", length=LENGTH),
        tokenizer=Tokenizer(kind="sentencepiece", model_type="bpe", vocab_size=50257),
        optimizer=Optimizer(
            learning_rate=learning_rate,
            warmup_steps=round(375e6 / tokens),
            decay_steps=round(260e9 / tokens),
            end_fraction=0.1,
            b1=0.9,
            b2=0.95,
            epsilon=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=Train(
            steps=round(300e9 / tokens),
            global_batch_size=rows,
            max_rows_per_device=8,
            eval_every=2000,
            checkpoint_every=2000,
        ),
        mesh=Mesh(on=MESHES.get(variant, ("any: data=-1",))),
        eval=Eval(max_batches=20),
    )
    return config_dict(tiny(config) if variant == "tiny" else config)


def tiny(config):
    """The same on the built-in text, for a laptop."""
    return config.replace(
        model={"vocab_size": None, "max_length": 256, "attention_windows": (0, 32), "dtype": "float32"},
        data={"train": "builtin:python_manual[:90%]", "eval": "builtin:python_manual[90%:]", "length": 128},
        tokenizer={"kind": "bytes"},
        optimizer={"warmup_steps": 50, "decay_steps": None},
        train={"steps": 300, "max_rows_per_device": None, "eval_every": 100, "checkpoint_every": 100},
        eval={"max_batches": 0},
    )
