"""Tasks as text to text: records of any source written as an input and a target (T5: Raffel et al. 2020).

``task:NAME[@SPLIT]`` is a source with the fields ``source`` and ``target``. The names are those of :data:`TASKS`, of
the config's ``data.tasks``, or ``FILE.jsonl#NAME`` with a task a line in a file.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmx.errors import DataError, nearest
from lmx.paths import user_path
from lmx.text import readers
from lmx.text.readers import Record
from lmx.text.templates import Template

SPLITTING = ("tfds", "hf")  # kinds of source with splits of their own
_IS = {
    "a text": lambda value: isinstance(value, str),
    "a list of texts": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "a number": lambda value: isinstance(value, int | float) and value >= 0,
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      source: where the records come from, without split and slice. ``{split}`` in it stands for the split; sources of
        TFDS and of the datasets library have it appended.
      input: the template of the encoder's text (see :class:`~lmx.text.templates.Template`).
      target: the template of the decoder's text.
      labels: names for the numbers in the field ``label``.
      step: numbers in the field ``label`` are rounded to a multiple of this, and written with one decimal; 0: they are
        not numbers to be read.
    """

    source: str
    input: str
    target: str
    labels: tuple[str, ...] = ()
    step: float = 0.0

    @classmethod
    def parse(cls, text: str, where: str) -> tuple[str, "Task"]:
        """Name and task of a JSON object with ``name`` and the attributes; a DataError where it is none."""
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}.") from None
        known = ["name", *(field.name for field in dataclasses.fields(cls))]
        missing = [name for name in known[:4] if not isinstance(fields, Mapping) or name not in fields]
        if missing:
            raise DataError(f"{where} is no task: it lacks {', '.join(missing)}.")
        for name, value in fields.items():
            if name not in known:
                raise DataError(f"{where} has a field {name!r}, which a task has not{nearest(name, known)}")
            due = {"labels": "a list of texts", "step": "a number"}.get(name, "a text")
            if not _IS[due](value):
                raise DataError(f"{where} has {value!r} as {name!r}, where {due} is due.")
        name = fields.pop("name")
        return name, cls(**fields | {"labels": tuple(fields.get("labels", ()))})

    def spec(self, split: str) -> str:
        """The source string of a split; an empty one is what the source has without any."""
        if "{split}" in self.source:
            return self.source.replace("{split}", split or "train")
        if split and self.source.partition(":")[0] not in SPLITTING:
            raise DataError(
                f"the task's source {self.source!r} has no splits, so @{split} cannot be read; write {{split}} where "
                "the split's name belongs, or leave it out."
            )
        return f"{self.source}@{split}" if split else self.source


class TaskRecords(Sequence[Record]):
    """The records of a source as the ``source`` and ``target`` of a task."""

    def __init__(self, records: Sequence[Record], task: Task):
        self._records, self._task, self.files = records, task, getattr(records, "files", ())
        self._input, self._target = Template(task.input), Template(task.target)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._records[index]
        if "label" in record and (self._task.labels or self._task.step):
            record = {**record, "label": self._label(record["label"])}
        return {"source": str(self._input(record)), "target": str(self._target(record))}

    def _label(self, value: Any) -> str:
        labels, step = self._task.labels, self._task.step
        if step:
            return f"{round(value / step) * step:.1f}"
        if isinstance(value, str) and value in labels:
            return value
        if not isinstance(value, int) or not 0 <= value < len(labels):
            raise DataError(
                f"a record of {self._task.source!r} has label {value!r}, which has no name among the task's labels "
                f"({', '.join(labels)}). A split without labels cannot be written as this task."
            )
        return labels[value]


def find_task(name: str, own: Sequence[str]) -> Task:
    """The task of a name.

    Args:
      name: of :data:`TASKS` or of ``own``, or ``FILE.jsonl#NAME``.
      own: tasks as JSON objects, the config's ``data.tasks``; they go before those of lmx.

    Raises:
      DataError: there is no such task, or it cannot be read.
    """
    path, hash_sign, inner = name.rpartition("#")
    if hash_sign:
        known = dict(_of_file(user_path(path)))
        name, where = inner, f" in {path}"
    else:
        known = TASKS | dict(Task.parse(text, f"entry {number} of data.tasks") for number, text in enumerate(own))
        where = ""
    if name not in known:
        raise DataError(f"there is no task {name!r}{where}{nearest(name, known)}")
    return known[name]


def _of_file(path: Path) -> Iterator[tuple[str, Task]]:
    fields = ("name", "source", "input", "target")
    for record in readers.read_jsonl(str(path), fields):
        yield Task.parse(json.dumps(record), f"the task {record['name']!r} of {path}")


def _glue(name: str, *fields: str, labels: Sequence[str] = (), step: float = 0.0) -> Task:
    """A task of GLUE in T5's form: its name, and each text after the name of its field."""
    parts = " ".join(f"{field}: {{{field}}}" for field in fields)
    return Task(f"tfds:glue/{name}", f"{name} {parts}", "{label}", tuple(labels), step)


_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")

# Raffel et al. 2020, appendix D, which shows each task as the model reads it; the data sets are those of section 2.3.
TASKS: Mapping[str, Task] = {
    "glue_cola": _glue("cola", "sentence", labels=("unacceptable", "acceptable")),
    "glue_rte": _glue("rte", *_SENTENCES, labels=_ENTAILMENT),
    "glue_mnli": _glue("mnli", "hypothesis", "premise", labels=("entailment", "neutral", "contradiction")),
    "glue_mrpc": _glue("mrpc", *_SENTENCES, labels=("not_equivalent", "equivalent")),
    "glue_qnli": _glue("qnli", "question", "sentence", labels=_ENTAILMENT),
    "glue_qqp": _glue("qqp", "question1", "question2", labels=("not_duplicate", "duplicate")),
    "glue_sst2": _glue("sst2", "sentence", labels=("negative", "positive")),
    "glue_stsb": _glue("stsb", *_SENTENCES, step=0.2),
    "cnn_dailymail": Task("tfds:cnn_dailymail", "summarize: {article}", "{highlights}"),
    "squad": Task("tfds:squad/v1.1", "question: {question} context: {context}", "{answers[text][0]}"),
    "wmt_en_de": Task("tfds:wmt_t2t_translate/de-en", "translate English to German: {en}", "{de}"),
    "wmt_en_fr": Task("tfds:wmt15_translate/fr-en", "translate English to French: {en}", "{fr}"),
    "wmt_en_ro": Task("tfds:wmt16_translate/ro-en", "translate English to Romanian: {en}", "{ro}"),
}
