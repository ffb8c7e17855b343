"""What the model writes at each evaluation, for ``samples.txt``."""

import re
from pathlib import Path

from lmx.errors import ConfigError
from lmx.generation.generate import generate
from lmx.training.experiment import Experiment
from lmx.training.optimizers import eval_params
from lmx.training.state import TrainState

NEW_TOKENS = 160
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a byte model writes too, and no text file should hold


def sample_prompt(experiment: Experiment) -> list[int]:
    """The tokens of ``train.sample_prompt``; none where no samples are written: only decoders continue a text.

    Raises:
      ConfigError: the model's rows have no room for it and one token more.
    """
    train, model, tokenizer = experiment.config.train, experiment.config.model, experiment.tokenizer
    if model.architecture != "decoder" or not train.samples:
        return []
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    prompt = [start, *tokenizer.encode(train.sample_prompt)]
    if len(prompt) >= model.max_length:
        raise ConfigError(
            f"train.sample_prompt is {len(prompt)} tokens with the one that begins it, and model.max_length is "
            f"{model.max_length}: nothing could be written after it; use a shorter prompt, or train.samples=0."
        )
    return prompt


def write_samples(workdir: Path, step: int, experiment: Experiment, state: TrainState) -> None:
    """Appends ``train.samples`` continuations of the prompt to samples.txt."""
    train, model, tokenizer = experiment.config.train, experiment.config.model, experiment.tokenizer
    prompt = sample_prompt(experiment)
    if not prompt:
        return
    continued = generate(
        experiment.model,
        eval_params(state),
        [prompt] * train.samples,
        max_new_tokens=min(NEW_TOKENS, model.max_length - len(prompt)),
        temperature=0.8,
        top_p=0.95,
        stop_ids=tokenizer.stop_ids,
        bidirectional_prompt=experiment.config.objective.name == "prefix_lm",
        seed=experiment.config.seed,
    )
    with (workdir / "samples.txt").open("a", encoding="utf-8") as file:
        for number, ids in enumerate(continued, start=1):
            # Decoded with the prompt: alone, the first piece would lose the space before it.
            text = CONTROL.sub("\ufffd", tokenizer.decode([*prompt, *ids]))
            file.write(f"=== step {step}, sample {number}\n{text}\n\n")
