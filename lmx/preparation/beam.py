"""The same preparation as an Apache Beam pipeline, for what one machine is too small for.

Parts are cleaned and written by the very functions that one machine uses, and what is a duplicate is decided by the
same rule, by grouping in place of sorting; so the output is the same, byte for byte. The workers must see the sources
and the output folder under the same paths as whoever starts the pipeline (a shared file system): texts and shards go
through files, and only hashes and minima go through the pipeline.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lmx.errors import DataError, LmxError, missing_extra
from lmx.preparation.duplicates import EXACT, MINIMA, NEAR, alike, band_keys
from lmx.preparation.shards import Job, clean_part, write_part

Place = tuple[int, int]  # a part, and a document in it


def beam_runner(name: str, options: Sequence[str]) -> Callable[[Job], None]:
    """What runs a job on ``DirectRunner``, ``DataflowRunner``, ``FlinkRunner``, ``SparkRunner``, …

    Args:
      name: of the runner.
      options: of the pipeline, as Beam's own command lines have them (``--project=…``).

    Raises:
      LmxError: the package apache-beam is not installed, or there is no such runner.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise missing_extra("apache-beam", "beam", f"--runner {name}") from None
    try:
        runner = beam.runners.runner.create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise LmxError(f"--runner {name}: {error}.") from None

    def run(job: Job) -> None:
        try:
            with beam.Pipeline(runner, PipelineOptions(list(options))) as pipeline:
                _build(pipeline, job)
        except Exception as error:  # a runner wraps what a worker raised in whatever it likes
            raise DataError(f"the pipeline failed: {str(error).strip().splitlines()[-1]}") from error

    return run


def _build(pipeline: Any, job: Job) -> None:
    import apache_beam as beam

    numbers = pipeline | "parts" >> beam.Create(range(len(job.parts))) | beam.Reshuffle()
    documents = numbers | "clean" >> beam.FlatMap(_cleaned, job)
    dropped = []
    if job.settings.duplicates != "keep":
        first_of_each = beam.FlatMap(_exact).with_outputs("kept", main="dropped")
        found = documents | "by hash" >> beam.GroupByKey() | "exact" >> first_of_each
        dropped.append(found.dropped)
    if job.settings.duplicates == "near":
        bands = found.kept | "bands" >> beam.FlatMap(_banded, job) | "by band" >> beam.GroupByKey()
        dropped.append(bands | "near" >> beam.FlatMap(_near, job.settings.similarity))
    by_part = {"parts": numbers | "part" >> beam.Map(lambda number: (number, None))}
    if dropped:
        by_part["dropped"] = dropped | beam.Flatten()
    _ = by_part | "by part" >> beam.CoGroupByKey() | "write" >> beam.Map(_written, job)


def _cleaned(number: int, job: Job) -> Iterator[tuple[bytes, tuple[Place, bytes]]]:
    """Hash, place and minima of each document of a part."""
    clean_part(job, number)
    digests = job.file(number, "digests").read_bytes()
    near = job.settings.duplicates == "near"
    signatures = job.file(number, "minima").read_bytes() if near else b""
    for i in range(len(digests) // 16):
        yield digests[16 * i : 16 * i + 16], ((number, i), signatures[4 * MINIMA * i : 4 * MINIMA * (i + 1)])


def _exact(group: tuple[bytes, Iterable[tuple[Place, bytes]]]) -> Iterator[Any]:
    import apache_beam as beam

    first, *others = sorted(group[1])
    yield beam.pvalue.TaggedOutput("kept", first)
    for (number, position), _ in others:
        yield number, (position, EXACT)


def _banded(document: tuple[Place, bytes], job: Job) -> Iterator[tuple[bytes, tuple[Place, bytes]]]:
    signature = np.frombuffer(document[1], np.uint32).reshape(1, MINIMA)
    for key in band_keys(signature, job.settings.bands)[0]:
        yield key.tobytes(), document


def _near(group: tuple[bytes, Iterable[tuple[Place, bytes]]], similarity: float) -> Iterator[tuple[int, Place]]:
    (_, head), *others = sorted(group[1])
    for (number, position), signature in others:
        if alike(*(np.frombuffer(one, np.uint32) for one in (head, signature)), similarity):
            yield number, (position, NEAR)


def _written(item: tuple[int, dict[str, Iterable[Any]]], job: Job) -> int:
    number, groups = item
    reasons = np.zeros(job.file(number, "digests").stat().st_size // 16, np.uint8)
    for position, reason in groups.get("dropped", ()):
        reasons[position] = reason
    write_part(job, number, reasons)
    return number
