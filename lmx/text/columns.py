"""Readers of columns: Parquet files through pyarrow, and the datasets library; :mod:`lmx.text.corpora` slices both.

Both read the named fields alone, by index, from files that are mapped into memory.
"""

import bisect
import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmx.errors import DataError, missing_extra, nearest
from lmx.paths import user_path
from lmx.text import readers
from lmx.text.readers import Record

# Decoded row groups that are kept, in bytes: rows are read in random order, and a row group is decoded as a whole.
CACHE_BYTES = 512 << 20


# parquet:


class ParquetRecords(Sequence):
    """Records of Parquet files, one after the other; a row group is decoded when one of its rows is asked for."""

    def __init__(self, paths: Sequence[Path], fields: Sequence[str]):
        self._paths, self.files = list(paths), tuple(paths)
        self._groups: list[tuple[int, int]] = []  # file and row group of each row group
        counts = []
        self._reset()
        self._columns = self._check_columns([*dict.fromkeys(map(readers.column, fields))])
        for number, path in enumerate(self._paths):
            metadata = self._open(number).metadata
            for group in range(metadata.num_row_groups):
                self._check_nulls(f"row group {group} of {path}", metadata.row_group(group))
                self._groups.append((number, group))
                counts.append(metadata.row_group(group).num_rows)
        self._starts = list(itertools.accumulate(counts, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        which = bisect.bisect_right(self._starts, index) - 1
        table, row = self._table(which), index - self._starts[which]
        try:
            return {name: readers.plain(table.column(name)[row].as_py()) for name in table.column_names}
        except UnicodeDecodeError as error:
            number, group = self._groups[which]
            raise DataError(
                f"row {row} of row group {group} of {self._paths[number]} is not UTF-8 text: {error}."
            ) from error

    def __getstate__(self) -> dict[str, Any]:  # worker processes open the files themselves
        return {name: value for name, value in vars(self).items() if name not in ("_files", "_tables", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._files: dict[int, Any] = {}
        self._tables: OrderedDict[int, Any] = OrderedDict()  # the one used last stands last
        self._lock = threading.Lock()

    def _open(self, number: int) -> Any:
        if number not in self._files:
            import pyarrow
            from pyarrow import parquet

            try:
                self._files[number] = parquet.ParquetFile(
                    self._paths[number], memory_map=True, page_checksum_verification=True
                )
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{self._paths[number]} cannot be read as Parquet: {error}") from error
        return self._files[number]

    def _table(self, which: int) -> Any:
        """The row group, decoded."""
        import pyarrow

        number, group = self._groups[which]
        with self._lock:
            if which not in self._tables:
                try:
                    self._tables[which] = self._open(number).read_row_group(group, columns=self._columns)
                except (pyarrow.ArrowException, OSError, MemoryError) as error:
                    raise DataError(f"row group {group} of {self._paths[number]} cannot be read: {error}") from error
                while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > CACHE_BYTES:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(which)
            return self._tables[which]

    def _check_columns(self, columns: list[str]) -> list[str]:
        """The columns, which every file must have."""
        for number, path in enumerate(self._paths):
            found = self._open(number).schema_arrow.names
            for name in columns:
                readers.lookup(str(path), dict.fromkeys(found), name)
        return columns

    def _check_nulls(self, where: str, group: Any) -> None:
        """Raises where the file itself says that a column has holes; others are found when they are read."""
        for i in range(group.num_columns):
            part = group.column(i)
            nulls = part.statistics.null_count if part.is_stats_set else 0
            if part.path_in_schema in self._columns and nulls:
                raise DataError(
                    f"field {part.path_in_schema!r} of {where} is missing in {nulls:,} rows, where a text or a number "
                    "is due. Leave those rows out."
                )


def read_parquet(pattern: str, fields: Sequence[str]) -> Sequence[Record]:
    """The Parquet files that a path, a folder or a glob names, sorted by path."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise missing_extra("pyarrow", "parquet", f"the source parquet:{pattern}") from None
    return ParquetRecords(readers.find_files(pattern, (".parquet",)), fields)


# hf:


class _HubRecords(Sequence):
    """Records of a split of the datasets library, which maps its files into memory.

    Attributes:
      class_names: of each field that holds classes, their names in order.
    """

    def __init__(self, data: Any, fields: Sequence[str]):
        where = "the data set"
        for path in fields:
            readers.lookup(where, dict.fromkeys(data.column_names), readers.column(path))
        self._data = data.select_columns([*dict.fromkeys(map(readers.column, fields))])
        self.files = tuple(Path(file["filename"]) for file in data.cache_files)
        self.class_names = {name: tuple(f.names) for name, f in data.features.items() if getattr(f, "names", None)}

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        return self._data[range(len(self))[index]]


def read_hf(name: str, fields: Sequence[str]) -> Sequence[Record]:
    """A split of a data set of the datasets library: a folder of its ``save_to_disk``, or a name on the hub."""
    name, _, split = name.partition("@")
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "datasets", f"the source hf:{name}") from None
    folder = user_path(name)
    try:
        found = datasets.load_from_disk(str(folder)) if folder.is_dir() else _from_hub(name)
    except Exception as error:  # of many kinds: unknown names, no network, no space, a damaged file
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"the datasets library cannot provide {name!r}: {reason}") from error
    if isinstance(found, datasets.Dataset):
        if split:
            raise DataError(f"the data set {name!r} has no splits; leave out @{split}.")
        return _HubRecords(found, fields)
    split = split or "train"
    if split not in found:
        raise DataError(f"the data set {name!r} has no split {split!r}{nearest(split, found)}")
    return _HubRecords(found[split], fields)


def _from_hub(name: str) -> Any:
    """Every split of NAME, ORGANIZATION/NAME, NAME/CONFIG or ORGANIZATION/NAME/CONFIG."""
    import datasets

    *path, last = name.split("/")
    if len(path) < 2:
        try:
            return datasets.load_dataset(name)
        except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, ConnectionError):
            if not path:
                raise
    return datasets.load_dataset("/".join(path), last)
