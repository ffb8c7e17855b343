"""Fine-tuning a published BERT to classify texts (Devlin et al. 2019, section 4.1), from its Hugging Face folder.

    lmx train --config experiments/bert_classify.py --workdir runs/sentiment \\
        --config.train.init_from=bert-base-uncased \\
        --config.data.train=jsonl:train.jsonl --config.data.eval=jsonl:eval.jsonl
    lmx predict --workdir runs/sentiment --text "This movie is great!"

`init_from` is a folder of a published checkpoint (BERT, RoBERTa, DistilBERT, GPT-2, Llama, …) or its name on the hub;
the body and the tokenizer are its own, and `config.model` says only what is fine-tuned: the head, the number of
classes, dropout before it, and how to compute.

Variants:
  base  AdamW at 1e-5 for three epochs of 32 rows: set `train.steps` to 3 * records / 32 (a run begins by saying
        how many epochs its steps are).
  tiny  the same at 5e-4 for 60 steps of 8 rows, for a small model and a laptop.

As published, BERT-base has an accuracy of 93.5 on SST-2 (GLUE test, Table 1); nothing is claimed for other data.
"""

from lmx.config import Config, Data, Model, Objective, Optimizer, Train, config_dict
from lmx.errors import ConfigError, nearest

VARIANTS = ("base", "tiny")


def get_config(variant="base"):
    if variant not in VARIANTS:
        raise ConfigError(f"bert_classify has no variant {variant!r}{nearest(variant, VARIANTS)}")
    config = Config(
        model=Model(architecture="encoder", heads=("classification",), num_classes=2, head_dropout=0.1),
        objective=Objective(name="classification"),
        data=Data(train="jsonl:train.jsonl", eval="jsonl:eval.jsonl", length=128, too_long="cut"),
        optimizer=Optimizer(
            learning_rate=1e-5, schedule="linear", warmup_steps=0, end_fraction=0.0, b2=0.999, weight_decay=0.01
        ),
        train=Train(
            steps=650,
            global_batch_size=32,
            eval_every=100,
            checkpoint_every=200,
            samples=0,
            init_from="bert-base-uncased",
        ),
    )
    return config_dict(tiny(config) if variant == "tiny" else config)


def tiny(config):
    """For a small published model, on a laptop."""
    return config.replace(
        data={"length": 32},
        optimizer={"learning_rate": 5e-4},
        train={"steps": 60, "global_batch_size": 8, "eval_every": 20, "checkpoint_every": 60},
    )
