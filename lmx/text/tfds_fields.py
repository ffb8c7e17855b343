"""What the features of TensorFlow Datasets are to lmx: one table.

A data set has the fields of the table beside its own, so the defaults of ``data.text_field`` and the others find
them, and a field that is named in the config is read as it is.
"""

import re
from collections.abc import Mapping

_TEXT = {"text": "{text}"}
_CLASSES = {"text": "{text}", "label": "{label}"}
_SENTENCE = {"text": "{sentence}", "label": "{label}"}
_SENTENCES = {"text": "{sentence1}", "pair": "{sentence2}", "label": "{label}"}
_PREMISE = {"text": "{premise}", "pair": "{hypothesis}", "label": "{label}"}
# As the config has them, `de-en` from German: the order of TFDS's supervised keys.
_TRANSLATION = {"text": "{FIRST}", "source": "{FIRST}", "target": "{SECOND}"}

# The fields of the objectives (text, pair and label; source and target), written from the data set's features.
TFDS_FIELDS: dict[str, dict[str, str]] = {
    "c4": _TEXT,
    "cnn_dailymail": {"text": "{article}", "source": "{article}", "target": "{highlights}"},
    "glue/ax": _PREMISE,
    "glue/cola": _SENTENCE,
    "glue/mnli": _PREMISE,
    "glue/mnli_matched": _PREMISE,
    "glue/mnli_mismatched": _PREMISE,
    "glue/mrpc": _SENTENCES,
    "glue/qnli": {"text": "{question}", "pair": "{sentence}", "label": "{label}"},
    "glue/qqp": {"text": "{question1}", "pair": "{question2}", "label": "{label}"},
    "glue/rte": _SENTENCES,
    "glue/sst2": _SENTENCE,
    "glue/stsb": _SENTENCES,
    "glue/wnli": _SENTENCES,
    "imdb_reviews": _CLASSES,
    "lambada": {"text": "{passage}"},
    "lm1b": _TEXT,
    "squad": {
        "text": "{context}",
        "source": "question: {question} context: {context}",
        "target": "{answers[text][0]}",
    },
    "wikipedia": _TEXT,
    **{f"wmt{year}_translate": _TRANSLATION for year in range(13, 20)},
    "wmt_t2t_translate": _TRANSLATION,
}


def tfds_fields(name: str) -> Mapping[str, str]:
    """The fields of a data set, as templates; none where the table does not have it.

    Args:
      name: NAME/CONFIG, and what may follow in a source string: a version, a split, a slice.
    """
    name, _, config = re.split(r"[:@\[]", name)[0].partition("/")
    first, dash, second = config.partition("-")
    fields = TFDS_FIELDS.get(f"{name}/{config}", TFDS_FIELDS.get(name, {}))
    if fields is _TRANSLATION:
        if not dash:
            return {}
        return {field: text.replace("FIRST", first).replace("SECOND", second) for field, text in fields.items()}
    return fields
