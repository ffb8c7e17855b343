"""Small stand-ins: a tokenizer of single letters, a model whose logits the test chooses, rows without a corpus."""

import dataclasses
import string

import jax
import jax.numpy as jnp
import numpy as np

from lmx.config import Config, from_dict
from lmx.kernels.linear_cross_entropy import Unembedding
from lmx.text.packing import TokenStore
from lmx.text.tokenizers import Tokenizer

PAD, BOS, EOS, UNK, MASK = range(5)


@dataclasses.dataclass
class Letters:
    """One id a character; words begin after a space. ``sentinels`` ids stand between specials and letters."""

    sentinels: int = 0
    pad_id: int | None = PAD
    bos_id: int | None = BOS
    eos_id: int | None = EOS
    unk_id: int | None = UNK
    mask_id: int | None = MASK
    cls_id: int | None = BOS
    sep_id: int | None = EOS

    alphabet = string.ascii_lowercase + " "

    @property
    def sentinel_ids(self):
        return tuple(range(5, 5 + self.sentinels))

    @property
    def special_ids(self):
        return frozenset(range(5 + self.sentinels))

    @property
    def vocab_size(self):
        return 5 + self.sentinels + len(self.alphabet)

    frame = Tokenizer.frame

    def encode(self, text):
        return [5 + self.sentinels + self.alphabet.index(character) for character in text]

    def word_starts(self, ids):
        space = self.encode(" ")[0]
        ids = np.asarray(ids)
        return np.concatenate([[True], ids[:-1] == space]) & (ids != space)


def config(name: str, /, **sections) -> Config:
    """A tiny config of the objective, with fields of its sections changed."""
    architecture, head = {
        "mlm": ("encoder", "mlm"),
        "causal": ("decoder", "lm"),
        "prefix_lm": ("decoder", "lm"),
        "span_corruption": ("encoder_decoder", "lm"),
        "seq2seq": ("encoder_decoder", "lm"),
        "classification": ("encoder", "classification"),
    }[name]
    tiny = {
        "model": {
            "architecture": architecture,
            "heads": (head,),
            "num_layers": 2,
            "embed_dim": 16,
            "num_heads": 2,
            "mlp_dim": 32,
            "max_length": 1024,
            "embedding_stddev": 0.5,
        },
        "objective": {"name": name},
        "data": {"length": 16, "target_length": 16},
    }
    return from_dict({section: tiny.get(section, {}) | sections.get(section, {}) for section in {*tiny, *sections}})


def row(*documents) -> dict[str, np.ndarray]:
    """A packed row of these documents."""
    return {
        "tokens": np.concatenate([np.array(document, np.int32) for document in documents]),
        "segments": np.repeat(np.arange(1, len(documents) + 1, dtype=np.int32), [len(d) for d in documents]),
        "positions": np.concatenate([np.arange(len(document), dtype=np.int32) for document in documents]),
    }


def corpus(*documents) -> TokenStore:
    """These documents as the text room holds them."""
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return TokenStore(np.concatenate([np.array(document, np.int32) for document in documents]), offsets)


def batch(objective, *examples) -> dict[str, jax.Array]:
    """Examples zero-padded to the objective's lengths and stacked, on the device."""

    def padded(name, value):
        value = np.asarray(value)
        return np.pad(value, (0, objective.lengths[name] - len(value))) if value.ndim else value

    stacked = {name: np.stack([padded(name, example[name]) for example in examples]) for name in examples[0]}
    return {name: jnp.asarray(value) for name, value in stacked.items()}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def no_sample(rng, length):
    raise AssertionError("this objective draws no samples")


class Oracle:
    """A bound model whose hidden states are given, and whose heads hand them on as logits."""

    def __init__(self, hidden, classes=None):
        self._hidden, self._classes = jnp.asarray(hidden), classes

    def hidden(self, batch, train=False):
        return self._hidden

    def lm_head(self, hidden):
        return Unembedding(hidden, jnp.eye(hidden.shape[-1]))

    mlm_head = lm_head

    def classify(self, hidden, batch, train=False):
        return jnp.asarray(self._classes)


def init(config, tokenizer, batch):
    """A real tiny Transformer for the config, and its variables."""
    import flax.linen as nn
    import jax

    from lmx.models.transformer import Transformer

    model = Transformer(dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
    variables = jax.jit(model.init)(jax.random.key(0), batch)
    return model, nn.meta.unbox(variables)
