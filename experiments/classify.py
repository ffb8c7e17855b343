"""Fine-tuning a classifier (Devlin et al. 2019, sections 3.2 and 4.1, appendix A.3).

The data are yours, a JSON object a line with fields `text` and `label`:

    lmx train --config experiments/classify.py --workdir runs/sentiment \\
        --config.data.train=jsonl:train.jsonl --config.data.eval=jsonl:eval.jsonl \\
        --config.train.init_from=runs/bert

`init_from` is a run of `experiments/bert.py:base`, whose body and tokenizer are taken over; without it the model
starts from nothing, which takes far more data. For pairs of texts set `--config.data.pair_field`; for other than two
classes `--config.model.num_classes`; for a number instead of classes `--config.objective.task=regression
--config.model.num_classes=1`.

Variants:
  base  BERT-base with the paper's settings: 32 rows a step, learning rate 3e-5 of {5e-5, 3e-5, 2e-5}, dropout 0.1,
        10% of the steps warm-up. The paper trains for 2 to 4 epochs: set `train.steps` to 3 * records / 32. Training
        stops when five evaluations have brought nothing.
  tiny  the body of `experiments/mlm.py:tiny`, 2 layers, 128 wide, from nothing or from a run of it, on a laptop.

As published, BERT-base has an accuracy of 93.5 on SST-2 (GLUE test, Table 1); nothing is claimed for other data.
"""

from lmx.config import Config, Data, Model, Objective, Optimizer, Tokenizer, Train, config_dict
from lmx.errors import ConfigError, nearest

VARIANTS = ("base", "tiny")


def get_config(variant="base"):
    if variant not in VARIANTS:
        raise ConfigError(f"classify has no variant {variant!r}{nearest(variant, VARIANTS)}")
    config = Config(
        model=Model(
            architecture="encoder",
            heads=("classification",),
            vocab_size=30522,
            num_layers=12,
            num_heads=12,
            embed_dim=768,
            mlp_dim=3072,
            max_length=512,
            norm_position="post",
            norm_epsilon=1e-12,
            num_token_types=2,
            embedding_norm=True,
            dropout=0.1,
            attention_dropout=0.1,
            head_dropout=0.1,
        ),
        objective=Objective(name="classification"),
        data=Data(train="jsonl:train.jsonl", eval="jsonl:eval.jsonl", length=128, too_long="cut"),
        tokenizer=Tokenizer(kind="sentencepiece", vocab_size=30522, lowercase=True),
        optimizer=Optimizer(
            learning_rate=3e-5,
            schedule="linear",
            warmup_steps=100,
            end_fraction=0.0,
            b2=0.999,
            epsilon=1e-6,
            weight_decay=0.01,
        ),
        train=Train(steps=1000, global_batch_size=32, eval_every=100, early_stop_evals=5, samples=0),
    )
    return config_dict(tiny(config) if variant == "tiny" else config)


def tiny(config):
    """The body of `experiments/mlm.py:tiny`, so that it can start from there, for a laptop."""
    return config.replace(
        model={
            "vocab_size": None,
            "num_layers": 2,
            "num_heads": 2,
            "embed_dim": 128,
            "mlp_dim": 512,
            "max_length": 128,
            "position": "rotary",
            "num_token_types": 0,
            "norm_epsilon": 1e-5,
            "pooling": "mean",
            "dropout": 0.5,
            "head_dropout": 0.5,
        },
        data={"length": 64},
        tokenizer={"vocab_size": 8000},
        optimizer={"learning_rate": 5e-4, "warmup_steps": 50},
        train={"steps": 800, "eval_every": 200, "checkpoint_every": 400, "early_stop_evals": 0},
    )
