"""Templates: fields of a record written from the fields it has."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from lmx.errors import DataError
from lmx.text.readers import Record, lookup

_PATH = re.compile(r"[^\[\]{}.!:]+(\[[^\[\]]+\])*")


class Template:
    """Text with fields in braces, ``question: {question} context: {context}``; a doubled brace is a brace.

    A field may be a path, ``{answers[text][0]}``. A template that is one field and nothing else has its value as it is,
    a number too.

    Attributes:
      paths: the fields that it reads.
    """

    def __init__(self, text: str):
        """Raises a DataError where the text is no template."""
        self.text = text
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise DataError(f"the template {text!r} cannot be read: {error}. A brace in the text is doubled.") from None
        for _, path, form, conversion in self._parts:
            if path is not None and (form or conversion or not _PATH.fullmatch(path)):
                raise DataError(
                    f"the template {text!r} has {path!r} in braces, where the name of a field is due, or a path into "
                    "one such as answers[text][0]."
                )
        self.paths = tuple(dict.fromkeys(path for _, path, _, _ in self._parts if path is not None))

    def __call__(self, record: Record) -> Any:
        values = {path: lookup(f"a record (for the template {self.text!r})", record, path) for path in self.paths}
        if len(self._parts) == 1 and self._parts[0][0] == "" and self.paths:
            return values[self.paths[0]]
        return "".join(text + ("" if path is None else str(values[path])) for text, path, _, _ in self._parts)


class Viewed(Sequence[Record]):
    """Records with fields that templates write, beside their own, which go before."""

    def __init__(self, records: Sequence[Record], templates: Mapping[str, Template]):
        self._records, self._templates = records, templates
        self.class_names, self.files = getattr(records, "class_names", {}), getattr(records, "files", ())

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._records[index]
        return {name: template(record) for name, template in self._templates.items()} | record
