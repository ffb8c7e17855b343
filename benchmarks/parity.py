"""The largest difference from transformers in each published family: small random models, float32, on this machine.

    python -m benchmarks.parity [--json FILE]

For each variant that ``tests/interop`` has: logits (or what the model has instead of them), and the gradients of a
random sum of them, each parameter's relative to the largest of theirs. Parameters without influence, such as the
biases of keys, have gradients that are rounding alone and are left out. Prints the table of ``docs/families.md``.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from lmx.interop.families import family_of
from lmx.interop.pretrained import read_config
from lmx.interop.writing import unrolled
from lmx.models.transformer import Transformer
from tests.interop import zoo
from tests.interop.test_families import batch_of, opened, pairs

LOGITS_GOAL, GRADIENTS_GOAL = 1e-4, 1e-3
ROUNDING = 1e-6  # times the model's largest gradient
# Whose variants stand together: model_type of config.json, as docs/families.md names it.
NAMES = {
    "bert": "BERT",
    "roberta": "RoBERTa, XLM-R",
    "distilbert": "DistilBERT",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX, Pythia",
    "t5": "T5, T5 v1.1, Flan-T5, byT5",
    "mt5": "mT5",
    "switch_transformers": "Switch Transformers",
    "llama": "Llama 2 and 3, SmolLM2",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
}


def difference(variant: str, folder: Path) -> tuple[str, float, float]:
    """The family, and the largest relative differences of outputs and of gradients."""
    it = opened(variant, folder)
    batch, mask = batch_of(it.model, zoo.inputs(it.theirs)), zoo.inputs(it.theirs)["attention_mask"]
    outputs = it.theirs(**zoo.torch_inputs(it.theirs))
    compared = list(pairs(outputs, Transformer(it.model).apply({"params": it.params}, batch)))
    theirs = [value for value, _ in compared]
    rng = np.random.default_rng(3)
    weights = [rng.standard_normal(value.shape).astype(np.float32) * _seen(value, mask) for value in theirs]
    sum((value * torch.tensor(w)).sum() for value, w in zip(theirs, weights, strict=True)).backward()

    def score(params):
        found = Transformer(it.model).apply({"params": params}, batch)
        ours = [value for _, value in pairs(outputs, found)]
        return sum((value * w).sum() for value, w in zip(ours, weights, strict=True))

    leaves, written = unrolled(jax.device_get(jax.jit(jax.grad(score))(it.params))), {}
    model_type = read_config(folder)["model_type"]
    family = family_of(model_type)
    for weight in family.weights(it.model):
        if weight.ours in leaves:
            weight.write(leaves[weight.ours], written)
    named = {name if name in written else family.prefix + name: p for name, p in it.theirs.named_parameters()}
    gradients = {name: p.grad.numpy() for name, p in named.items() if p.grad is not None}
    least = ROUNDING * max(np.abs(g).max() for g in gradients.values())
    moved = [name for name in written if name in gradients and np.abs(gradients[name]).max() > least]
    gradient = max(_relative(written[name], gradients[name]) for name in moved)
    logits = max(
        _relative(np.asarray(ours) * _seen(value, mask), value.detach().numpy() * _seen(value, mask))
        for value, ours in compared
    )
    return model_type, logits, gradient


def _seen(value, mask: np.ndarray) -> np.ndarray | float:
    """0 on padding, where outputs mean nothing."""
    if tuple(value.shape[:2]) != mask.shape:
        return 1.0
    return mask.astype(np.float32).reshape(mask.shape + (1,) * (value.ndim - 2))


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    found: dict[str, list[tuple[str, float, float]]] = {}
    for variant in zoo.VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            model_type, logits, gradients = difference(variant, Path(folder))
        found.setdefault(model_type, []).append((variant, logits, gradients))
    rows = []
    print("| family | variants compared | outputs | gradients |\n|---|---|---|---|")
    for model_type, compared in found.items():
        name, (variants, logits, gradients) = NAMES[model_type], zip(*compared, strict=True)
        print(f"| {name} | {', '.join(variants)} | {max(logits):.0e} | {max(gradients):.0e} |")
        rows.append({"name": f"{name}: outputs", "value": max(logits), "unit": "relative", "goal": LOGITS_GOAL})
        rows.append({"name": f"{name}: gradients", "value": max(gradients), "unit": "relative", "goal": GRADIENTS_GOAL})
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
