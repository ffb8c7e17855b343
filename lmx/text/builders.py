"""TFDS builders for sources of one's own, so that all data has one form: ArrayRecord files with an index."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmx.errors import DataError
from lmx.text.corpora import Source, open_source
from lmx.text.readers import check_fields, import_tfds


def prepare_tfds(
    name: str,
    splits: Mapping[str, str],
    data_dir: str | Path,
    fields: Sequence[str] = ("text",),
    version: str = "1.0.0",
) -> Path:
    """Writes sources as the splits of a TFDS data set, in their order, without TensorFlow.

    With ``TFDS_DATA_DIR`` set to ``data_dir`` it is ``tfds:NAME@SPLIT``; as a folder it is ``tfds:FOLDER@SPLIT``.

    Args:
      name: of the data set: lower-case letters, digits and underscores.
      splits: a source string for each split, ``{"train": "text:books/*.txt[:90%]", …}``.
      data_dir: where data sets lie; this one gets a folder of its own there.
      fields: of the records; each holds texts, whole numbers or numbers (in single precision) throughout.
      version: of the data set; another one stands beside it.

    Returns:
      The data set's folder.

    Raises:
      DataError: a source cannot be read, or a field does not hold the same kind of value everywhere.
      LmxError: the package tensorflow-datasets is not installed.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DataError(f"a data set is named by lower-case letters, digits and underscores, not {name!r}.")
    sources = {split: open_source(spec, fields) for split, spec in splits.items()}
    kinds = _kinds(sources, fields)
    tfds = import_tfds("writing a TFDS data set")

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Records of source strings."""

        VERSION = tfds.core.Version(version)

        def _info(self) -> Any:
            import numpy as np

            types = {str: tfds.features.Text(), int: np.int64, float: np.float32}
            features = tfds.features.FeaturesDict({field: types[kind] for field, kind in kinds.items()})
            described = "; ".join(f"{split}: {spec}" for split, spec in splits.items())
            # In the order of the source, so that slices mean the same.
            return tfds.core.DatasetInfo(builder=self, description=described, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
            return {split: self._generate_examples(source) for split, source in sources.items()}

        def _generate_examples(self, source: Source) -> Iterator[tuple[int, dict]]:
            for index in range(len(source)):
                yield index, _converted(source, index, kinds)

    Builder.name = name
    builder = Builder(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_path)


def _kinds(sources: Mapping[str, Source], fields: Sequence[str]) -> dict[str, type]:
    """Whether each field holds texts, whole numbers or numbers, by the first record of every source."""
    found = {}
    for field in fields:
        kinds = {type(source[0][field]) for source in sources.values()}
        found[field] = float if kinds == {int, float} else int if kinds <= {int, bool} else kinds.pop()
    return found


def _converted(source: Source, index: int, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The fields of a record, each of its kind."""
    record = source[index]
    check_fields(f"record {index} of {source.spec!r}", record, tuple(kinds))
    for field, kind in kinds.items():
        if not isinstance(record[field], int | float if kind is float else kind):
            raise DataError(
                f"field {field!r} of record {index} of {source.spec!r} is {record[field]!r}, where the first one has "
                f"{kind.__name__}; write the same kind of value throughout."
            )
    return {field: record[field] for field in kinds}
