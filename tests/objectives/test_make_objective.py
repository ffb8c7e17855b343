import pytest

from lmx.objectives import OBJECTIVES, make_objective
from lmx.text.tokenizers import make_tokenizer

from .stubs import config, corpus, rng

RECORD = {"text": "some text", "source": "ab", "target": "ba", "label": 1}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_views_real_ids(name):
    setting = config(name, tokenizer={"kind": "bytes", "num_sentinels": 4})
    tokenizer = make_tokenizer(setting.tokenizer, lambda: [RECORD["text"]])
    objective = make_objective(setting, tokenizer)
    assert type(objective) is OBJECTIVES[name]
    store = corpus(tokenizer.encode(RECORD["text"]))
    row = RECORD if objective.cut is None else store.rows(objective.cut)[0]
    example = objective.view(row, rng(), store.sample)
    tokens = example["encoder_tokens" if "encoder_tokens" in example else "tokens"]
    assert 1 < len(tokens) <= 16 and tokens.dtype == "int32"
    assert {array for array, value in example.items() if value.ndim} == set(objective.lengths)
