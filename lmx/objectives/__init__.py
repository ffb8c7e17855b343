"""What is predicted and how it is scored. Each objective is one small file."""

from lmx.config import Config
from lmx.objectives.base import Batch, Example, Objective, check_lengths
from lmx.objectives.causal import Causal
from lmx.objectives.classification import Classification
from lmx.objectives.mlm import MaskedLanguageModel
from lmx.objectives.prefix_lm import PrefixLM
from lmx.objectives.seq2seq import Seq2Seq
from lmx.objectives.span_corruption import SpanCorruption
from lmx.text.corpora import source_names
from lmx.text.tokenizers import Tokenizer

__all__ = ["OBJECTIVES", "Batch", "Example", "Objective", "make_objective"]

OBJECTIVES = {
    "mlm": MaskedLanguageModel,
    "causal": Causal,
    "prefix_lm": PrefixLM,
    "span_corruption": SpanCorruption,
    "seq2seq": Seq2Seq,
    "classification": Classification,
}


def make_objective(config: Config, tokenizer: Tokenizer) -> Objective:
    """The objective that ``config.objective.name`` asks for.

    Args:
      config: a checked config; for classification with string labels, ``data.labels`` is filled in.
      tokenizer: the ids of special tokens and, for records, from text to ids.

    Raises:
      ConfigError: the tokenizer lacks a token that the objective needs, or lengths do not fit.
    """
    objective = OBJECTIVES[config.objective.name](config, tokenizer)
    names = source_names(config.data.train)
    objective.sources = names if len(names) > 1 else ()
    check_lengths(objective, config)
    return objective
