"""The documents of sources, in parts that are read apart from each other and never held whole.

A ``text:`` file is a document, or as many as it has lines (``documents="line"``); one of more than a million bytes
is cut at ends of lines. Plain files are read in ranges of bytes, so that one large file is many parts; a compressed
one is one part, whatever its size. Everything that is not a plain path (a slice, or another kind of source) is
opened as training opens it, and read by ranges of records.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from lmx.errors import DataError
from lmx.paths import user_path
from lmx.text import readers
from lmx.text.corpora import Source, open_source

try:
    import orjson
except ImportError:  # it comes with the extra "prepare"; everything is right without it, and a little slower
    orjson = None

LONGEST_DOCUMENT = 1 << 20  # bytes of a text file's document
LONGEST_LINE = 1 << 26  # bytes of a line of JSON
RECORDS_A_PART = 10_000
TO_THE_END = -1


@dataclasses.dataclass(frozen=True)
class Span:
    """The lines of a file that begin from byte ``start`` to before byte ``stop`` (``TO_THE_END``)."""

    path: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Part:
    """What one process reads at a time: spans of files, or records ``start`` to ``stop`` of an opened source."""

    source: int
    spec: str
    spans: tuple[Span, ...] = ()
    start: int = 0
    stop: int = 0


@dataclasses.dataclass(frozen=True)
class Reading:
    """How texts are taken from records and files.

    Attributes:
      field: of a record, that holds the text.
      documents: of a text file: ``file`` or ``line``.
      unreadable: lines that are not JSON or have no text, documents that are not UTF-8: ``stop`` at one, or ``skip``
        it. Of ``jsonl:`` and ``text:`` files: tables, and slices of files, are opened as training opens them.
    """

    field: str = "text"
    documents: str = "file"
    unreadable: str = "stop"


def plan_parts(specs: Sequence[str], reading: Reading, part_bytes: int) -> list[Part]:
    """Cuts the sources into parts of about ``part_bytes``; the same files give the same parts.

    Raises:
      DataError: a source is missing, or is a mixture (whose weights would mean nothing here).
    """
    parts = []
    for number, spec in enumerate(specs):
        files = source_files(spec)
        if files:
            spans = list(_grouped(files, part_bytes))
            if not spans:
                raise DataError(f"the source {spec!r} is empty: it holds no text at all.")
            parts += [Part(number, spec, group) for group in spans]
            continue
        source = _opened(spec, reading.field)
        if len(source.sources) > 1:
            raise DataError(f"{spec!r} is a mixture: prepare each of its sources, and mix what is prepared.")
        bounds = [*range(0, len(source), RECORDS_A_PART), len(source)]
        parts += [Part(number, spec, (), a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return parts


def source_files(spec: str) -> list[Path]:
    """The files of a source that is read by ranges of bytes; none where it is opened as training opens it."""
    scheme, _, rest = spec.partition(":")
    path = user_path(rest)
    if scheme == "jsonl" and path.is_file():
        return [path]
    if scheme == "text" and (path.exists() or not rest.endswith("]")):
        return readers.find_files(rest, readers.TEXT_SUFFIXES)
    return []


def describe_files(files: Sequence[Path]) -> list[dict]:
    """Path, size and SHA-256 of each file."""
    described = []
    for path in files:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise readers.unreadable(path, error) from error
        described.append({"path": str(path), "bytes": path.stat().st_size, "sha256": digest})
    return described


def read_part(part: Part, reading: Reading) -> Iterator[str | DataError]:
    """The texts of a part, in order; in the place of an unreadable one its error, where it is to be skipped.

    Raises:
      DataError: a file is damaged; or a record is not UTF-8, not JSON, or has no text in the field, and is not skipped.
    """
    for span in part.spans:
        if part.spec.startswith("jsonl:"):
            yield from _json_texts(span, reading)
        else:
            yield from _texts(span, reading)
    if not part.spans:
        source = _opened(part.spec, reading.field)
        for index in range(part.start, part.stop):
            yield _text(source[index], reading.field, f"record {index} of {part.spec!r}")


def _or_error(reading: Reading, read: Callable[[], str]) -> str | DataError:
    try:
        return read()
    except DataError as error:
        if reading.unreadable == "stop":
            raise
        return error


@functools.lru_cache(maxsize=2)
def _opened(spec: str, field: str) -> Source:
    return open_source(spec, (field,))


def _text(record: readers.Record, field: str, where: str) -> str:
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"field {field!r} of {where} is {'null' if text is None else repr(text)}, where a text is due.")
    return text


def _grouped(files: Sequence[Path], part_bytes: int) -> Iterator[tuple[Span, ...]]:
    """Small files together, large ones in ranges, compressed ones each alone."""
    group: list[Span] = []
    size = 0
    for path in files:
        length = path.stat().st_size
        packed = path.suffix in readers.COMPRESSIONS
        if group and (packed or size + length > part_bytes):
            yield tuple(group)
            group, size = [], 0
        if packed:
            yield (Span(str(path), 0, TO_THE_END),)
        elif length > part_bytes:
            for start in range(0, length, part_bytes):
                yield (Span(str(path), start, min(start + part_bytes, length)),)
        elif length:
            group.append(Span(str(path), 0, length))
            size += length
    if group:
        yield tuple(group)


def _json_texts(span: Span, reading: Reading) -> Iterator[str | DataError]:
    path, field = Path(span.path), reading.field

    def strictly(line: bytes, where: int | str, start: int) -> str:
        return _text(readers.parse_record(line, path, where, start, (field,)), field, f"{path} line {where}")

    for number, (start, line) in enumerate(_lines(span, LONGEST_LINE), start=1):
        if len(line) >= LONGEST_LINE and not line.endswith(b"\n"):
            raise DataError(f"{path} has a line of more than {LONGEST_LINE:,} bytes at offset {start:,}.")
        if (text := _plain_text(line, field)) is not None:
            yield text
        elif line.strip():
            where = number if span.start == 0 else f"{number} after byte {span.start:,}"
            yield _or_error(reading, functools.partial(strictly, line, where, start))


def _plain_text(line: bytes, field: str) -> str | None:
    """The text of a record that is as it should be; none where a closer and slower look is due."""
    if orjson is None:
        return None
    try:
        text = orjson.loads(line)[field]
    except (LookupError, TypeError, ValueError):
        return None
    return text if isinstance(text, str) else None


def _texts(span: Span, reading: Reading) -> Iterator[str | DataError]:
    held: list[bytes] = []
    begin = size = 0

    def document() -> str:
        return _decoded(b"".join(held), span.path, begin)

    for start, line in _lines(span, LONGEST_DOCUMENT):
        begin = begin if held else start
        held.append(line)
        size += len(line)
        if size >= LONGEST_DOCUMENT or reading.documents == "line":
            yield _or_error(reading, document)
            held, size = [], 0
    if held:
        yield _or_error(reading, document)


def _decoded(content: bytes, path: str, offset: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise readers.not_utf8(Path(path), offset + error.start, content[error.start]) from None


def _lines(span: Span, longest: int) -> Iterator[tuple[int, bytes]]:
    """Offset and content of the lines of a span; one longer than ``longest`` bytes in several pieces."""
    path = Path(span.path)
    packed = path.stat().st_size if path.suffix in readers.COMPRESSIONS else None
    try:
        with readers.open_file(path) as file:
            place = _first_line(file, span.start, longest)
            inside = False  # a line of which the first pieces have been read
            while inside or place < span.stop or span.stop == TO_THE_END:
                line = _piece(file, longest)
                if not line:
                    return
                yield place, line
                place += len(line)
                inside = not line.endswith(b"\n")
                if packed is not None:
                    readers.check_unpacked(path, place, packed)
    except readers.UNPACKING_ERRORS as error:
        raise readers.unreadable(path, error) from error


def _first_line(file: BinaryIO, start: int, longest: int) -> int:
    """Goes to the first line that begins at ``start`` or after it; returns where that is."""
    if start:
        file.seek(start - 1)
        while (line := file.readline(longest)) and not line.endswith(b"\n"):
            pass
    return file.tell()


def _piece(file: BinaryIO, longest: int) -> bytes:
    """The next line, or ``longest`` bytes of it and the rest of their last character."""
    line = file.readline(longest)
    if len(line) == longest and not line.endswith(b"\n"):
        for _ in range(3):
            if (file.peek(1)[:1] or b"\0")[0] & 0xC0 != 0x80:
                break
            line += file.read(1)
    return line
