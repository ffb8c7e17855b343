"""``lmx data overlap``: how much of an evaluation set stands in the training text (Brown et al. 2020, appendix C).

Runs of ``n`` words, in lower case and without punctuation, are looked up. The evaluation set is indexed, so memory
follows its size; the training text is read once, part by part. As in that appendix, an example counts as *dirty* if
any run of it is found. One that has fewer than ``n`` words is not judged. (Their n is the length that 5 % of the
examples are below, from 8 to 13 words; and they leave out what more than ten training documents hold: here it counts.)
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from lmx.errors import DataError
from lmx.preparation.documents import Part, Reading, plan_parts, read_part
from lmx.preparation.ngrams import ngram_hashes
from lmx.text.corpora import split_mixture

WORD = re.compile(r"\w+")
PART_BYTES, SHOWN, LONGEST_SHOWN = 16 * 10**6, 10, 100


def overlap(
    train: str, evaluation: str, n: int, console: Console, field: str = "text", json_path: str | None = None
) -> list[dict]:
    """Prints how much of an evaluation set is found in a training source; writes it too if asked to.

    Args:
      train, evaluation: source strings; of a mixture, all sources are read once.
      n: words of a run.
      field: of the records of both, that holds the text.
      json_path: a file for the rows.

    Returns:
      rows of ``name``, ``value`` and ``unit``.

    Raises:
      DataError: a source cannot be read, or no example has ``n`` words.
    """
    if n < 1:
        raise DataError(f"--n must be at least 1 word, not {n}.")
    reading = Reading(field)
    examples = [text for part in _parts(evaluation, reading) for text in read_part(part, reading)]
    runs = [_runs(text, n) for text in examples]
    judged = [i for i, run in enumerate(runs) if len(run)]
    if not judged:
        raise DataError(f"no example of {evaluation!r} has {n} words; ask for fewer with --n.")
    known = np.unique(np.concatenate(runs))
    found, documents, hit = np.zeros(len(known), bool), 0, 0
    for text in _train_texts(train, reading, console):
        places = _places(known, _runs(text, n))
        found[places] = True
        documents, hit = documents + 1, hit + bool(len(places))
    shares = np.array([found[np.searchsorted(known, runs[i])].mean() for i in judged])
    rows = [
        ("examples", len(examples), "examples"),
        ("examples/judged", len(judged), "examples"),
        ("examples/dirty", int(np.count_nonzero(shares)), "examples"),
        ("examples/dirty_share", float(np.mean(shares > 0)), "of those judged"),
        ("examples/whole", int(np.count_nonzero(shares == 1)), "examples"),
        ("runs", len(known), f"different runs of {n} words"),
        ("runs/found", int(found.sum()), f"different runs of {n} words"),
        ("documents", documents, "training documents"),
        ("documents/with_overlap", hit, "training documents"),
    ]
    rows = [{"name": name, "value": value, "unit": unit} for name, value, unit in rows]
    for row in rows:
        value = f"{row['value']:.2%}" if isinstance(row["value"], float) else f"{row['value']:,}"
        console.print(f"{row['name']:>22}  {value} {row['unit']}", highlight=False)
    order = sorted(np.flatnonzero(shares).tolist(), key=lambda i: (-shares[i], i))
    for i in order[:SHOWN]:
        start = " ".join(examples[judged[i]].split())[:LONGEST_SHOWN]
        console.print(f"{shares[i]:>7.1%} of example {judged[i]:,}: {start}", highlight=False, markup=False)
    if json_path:
        dirty = [{"example": judged[i], "share": float(shares[i])} for i in order]
        contents = {"train": train, "eval": evaluation, "n": n, "rows": rows, "dirty": dirty}
        try:
            Path(json_path).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"--json: {json_path} cannot be written ({error}).") from None
    return rows


def _train_texts(train: str, reading: Reading, console: Console) -> Iterator[str]:
    parts = _parts(train, reading)
    with Progress(console=console, transient=True) as progress:
        for part in progress.track(parts, description="reading"):
            yield from read_part(part, reading)


def _parts(spec: str, reading: Reading) -> list[Part]:
    """The parts of a source, or of all the sources of a mixture."""
    return plan_parts([source for _, source in split_mixture(spec)], reading, PART_BYTES)


def _runs(text: str, n: int) -> np.ndarray:
    """Hashes of the runs of ``n`` words; none where there are fewer words."""
    words = WORD.findall(text.lower())
    return ngram_hashes([" ".join(words).encode()], n)[0] if len(words) >= n else np.zeros(0, np.uint64)


def _places(known: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Where among ``known``, which is sorted, those of the runs are that are there."""
    places = np.minimum(np.searchsorted(known, runs), len(known) - 1)
    return places[known[places] == runs]
