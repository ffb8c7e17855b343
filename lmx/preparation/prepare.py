"""``lmx data prepare``: from sources to shards of tokens, an index and a manifest.

    parts ──clean, hash──▶ texts, hashes, minima ──duplicates──▶ what is dropped ──tokenize──▶ shards ──▶ manifest

The first and the third step are done part by part, in any order and by any number of processes (or by Beam,
:mod:`lmx.preparation.beam`); the same settings and sources give the same bytes. What is done is found again by the next
run of the same command.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lmx import config as schema
from lmx.errors import DataError, LmxError
from lmx.paths import user_path
from lmx.preparation.cleaning import SHORT, UNREADABLE
from lmx.preparation.documents import describe_files, plan_parts, source_files
from lmx.preparation.duplicates import find_duplicates
from lmx.preparation.manifest import make_manifest, write_indexes
from lmx.preparation.processes import processes
from lmx.preparation.shards import (
    TOKENIZER,
    WORK,
    Beside,
    Job,
    Settings,
    check_settings,
    clean_part,
    kept_texts,
    write_json,
    write_part,
)
from lmx.text.prepared import MANIFEST, read_manifest, split_files
from lmx.text.tokenizers import DESCRIPTION, Tokenizer, load_tokenizer, make_tokenizer

LOCK, PLAN, REASONS = ".lock", "plan.json", "reasons"
# What else than the processes of this machine may do the work of a job whose tokenizer is there.
Runner = Callable[[Job], None]


def prepare(
    settings: Settings,
    tokenizer: schema.Tokenizer,
    output: str | os.PathLike,
    console: Console,
    num_processes: int = 1,
    runner: Runner | None = None,
) -> Path:
    """Prepares a corpus, or goes on with it where the folder holds a part of it.

    Args:
      settings: the sources, and what is done to them.
      tokenizer: as in a config; one that is to be trained is trained on the texts that are left.
      output: the folder to write.
      num_processes: of this machine; 1: this one alone.
      runner: does the work in the place of the machine's processes.

    Returns:
      The folder.

    Raises:
      DataError: a source is missing, malformed or changed since the work began, or the folder holds something else.
      ConfigError: the tokenizer cannot be opened.
    """
    check_settings(settings)
    folder = user_path(output)
    job = Job(settings, tuple(plan_parts(settings.sources, settings.reading, settings.part_bytes)), folder)
    ready = _ready_tokenizer(tokenizer, trains_later=runner is None)
    plan = _plan(settings, tokenizer, ready)
    with _locked(folder):
        if not _begin(folder, plan, console):
            return folder
        (folder / WORK).mkdir(exist_ok=True)
        write_json(folder / WORK / PLAN, plan)
        if ready is not None:
            ready.save(folder / TOKENIZER)
        if runner is not None:
            runner(job)
        else:
            _run_here(job, tokenizer, console, num_processes)
        _finish(job, plan)
    _summarize(folder, console)
    return folder


def _run_here(job: Job, tokenizer: schema.Tokenizer, console: Console, num_processes: int) -> None:
    columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    numbers = range(len(job.parts))
    with (
        Progress(*columns, TimeRemainingColumn(), console=console, refresh_per_second=2) as progress,
        processes(min(num_processes, len(numbers))) as call,
    ):
        call(clean_part, job, [(number,) for number in numbers], _bar(progress, "cleaning", len(numbers)))
        advance = _bar(progress, "duplicates", 1)
        reasons = find_reasons(job)
        advance()
        if not (job.folder / TOKENIZER / DESCRIPTION).is_file():
            advance = _bar(progress, "tokenizer", 1)
            make_tokenizer(tokenizer, lambda: _training_texts(job, reasons)).save(job.folder / TOKENIZER)
            advance()
        work = [(number, reasons[number]) for number in numbers]
        call(write_part, job, work, _bar(progress, "writing shards", len(numbers)))


def _bar(progress: Progress, title: str, total: int) -> Callable[[], None]:
    task = progress.add_task(title, total=total)
    return lambda: progress.advance(task)


def find_reasons(job: Job) -> list[np.ndarray]:
    """Why each document of each part is dropped."""
    digests = job.digests()
    path = job.folder / WORK / REASONS
    if not path.is_file():
        scratch = job.folder / WORK / "buckets"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        if job.settings.duplicates == "keep":
            found = np.zeros(len(digests), np.uint8)
        else:
            settings = job.settings
            found = find_duplicates(digests, job.signatures(), settings.bands, settings.similarity, scratch)
        with Beside(path) as (beside,):
            found.tofile(beside)
    return np.split(np.fromfile(path, np.uint8), digests.starts[1:-1])


def _training_texts(job: Job, reasons: Sequence[np.ndarray]) -> Iterator[str]:
    """The texts that are not held out, for a tokenizer that is trained."""
    for number in range(len(job.parts)):
        for held_out, text in kept_texts(job, number, reasons[number]):
            if not held_out:
                yield text


def _ready_tokenizer(section: schema.Tokenizer, trains_later: bool) -> Tokenizer | None:
    """The tokenizer, where no text is needed to make it."""
    if section.kind not in ("characters", "sentencepiece") or section.path:
        return make_tokenizer(section, lambda: ())
    if not trains_later:
        raise DataError(
            f"--runner needs a tokenizer that is there, and one of kind {section.kind!r} is to be trained: train it "
            "with `lmx tokenizer` first, and give it with --tokenizer."
        )
    return None


def _plan(settings: Settings, tokenizer: schema.Tokenizer, ready: Tokenizer | None) -> dict[str, Any]:
    """What must not change between a run and the next: settings, and the content of the files."""
    sources = [{"spec": spec, "files": describe_files(source_files(spec))} for spec in settings.sources]
    described = json.loads(json.dumps(dataclasses.asdict(settings)))
    section = json.loads(json.dumps(dataclasses.asdict(tokenizer)))
    if ready is not None:
        section["sha256"] = ready.fingerprint()
    return {"settings": described, "tokenizer": section, "sources": sources}


def _begin(folder: Path, plan: dict[str, Any], console: Console) -> bool:
    """Whether there is something to do; a DataError where the folder holds something else."""
    manifest, started = folder / MANIFEST, folder / WORK / PLAN
    if manifest.is_file():
        found = read_manifest(folder)
        if found.get("plan") != _digest(plan):
            raise DataError(
                f"{folder} holds a corpus that was prepared with other settings or from other files ({MANIFEST} says "
                "which); use another --output, or remove the folder."
            )
        shutil.rmtree(folder / WORK, ignore_errors=True)
        if not (damaged := _damaged(folder, found)):
            console.print(f"{folder.resolve()} is prepared already.", highlight=False, soft_wrap=True)
            return False
        console.print(
            f"{', '.join(damaged)} in {folder.resolve()} {'is' if len(damaged) == 1 else 'are'} damaged or missing; "
            "preparing the corpus again.",
            soft_wrap=True,
        )
        if TOKENIZER in damaged:
            shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
        (folder / WORK).mkdir()
        write_json(started, plan)
        manifest.unlink()
        return True
    before = json.loads(started.read_text(encoding="utf-8")) if started.is_file() else None
    if before not in (None, plan) and not any((folder / WORK).glob("*.cleaned")):  # nothing of it would be lost
        shutil.rmtree(folder / WORK)
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
        before = None
    if before is not None:
        if before != plan:
            raise DataError(
                f"{folder} holds part of a corpus, and since then this has changed: {_changes(before, plan)}. Give the "
                "same as before to go on with it, or another --output, or remove the folder."
            )
        console.print(f"going on with {folder.resolve()}", highlight=False, soft_wrap=True)
        for left in (*folder.glob("*.tmp"), *(folder / WORK).glob("*.tmp")):  # of a run that was killed
            left.unlink(missing_ok=True)
        return True
    others = [path.name for path in folder.iterdir() if path.name not in (LOCK, WORK)]
    if others:
        raise DataError(f"{folder} holds {others[0]!r} already; give a new or empty folder with --output.")
    console.print(f"preparing {', '.join(plan['settings']['sources'])} into {folder.resolve()}", soft_wrap=True)
    return True


def _damaged(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What is not, to the bit, as it was written."""
    known = {name: digest for split in manifest["splits"].values() for name, digest in split_files(split).items()}
    there = [name for name in known if (folder / name).is_file()]
    found = dict(
        zip(there, (file["sha256"] for file in describe_files([folder / name for name in there])), strict=True)
    )
    damaged = [name for name, digest in known.items() if found.get(name) != digest]
    try:
        whole = load_tokenizer(folder / TOKENIZER).fingerprint() == manifest["tokenizer"]["sha256"]
    except LmxError:
        whole = False
    return damaged if whole else [*damaged, TOKENIZER]


def _changes(before: dict[str, Any], plan: dict[str, Any]) -> str:
    """What differs between two plans: names of settings, and of files."""
    changed = [name for name, value in plan["settings"].items() if before["settings"].get(name) != value]
    old, new = (
        {file["path"]: file["sha256"] for source in each["sources"] for file in source["files"]}
        for each in (before, plan)
    )
    changed += [f"the content of {path}" for path in old if path in new and old[path] != new[path]]
    changed += [f"whether {path} is a source" for path in sorted(old.keys() ^ new.keys())]
    changed += ["tokenizer"] if before["tokenizer"] != plan["tokenizer"] else []
    return ", ".join(changed[:5])


def _finish(job: Job, plan: dict[str, Any]) -> None:
    """Indexes and the manifest, which makes the folder whole; then nothing else is left."""
    indexes = write_indexes(job)
    manifest = make_manifest(job, plan["sources"], plan["tokenizer"], indexes)
    write_json(job.folder / MANIFEST, manifest | {"plan": _digest(plan)})
    shutil.rmtree(job.folder / WORK)


def _digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps others away; a lock whose holder was killed is free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise DataError(f"--output: {folder} cannot be written ({error}).") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{folder} is being prepared by another process.") from None
        yield


def _summarize(folder: Path, console: Console) -> None:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    counts = manifest["counts"]
    dropped = {name: step["documents"] for name, step in counts["dropped"].items() if step["documents"]}
    listed = ", ".join(f"{count:,} {'too short' if name == SHORT else name}" for name, count in dropped.items())
    console.print(
        f"{counts['read']['documents']:,} documents read" + (f"; dropped: {listed}" if listed else ""), highlight=False
    )
    if counts["dropped"][UNREADABLE]["documents"]:
        first = counts["dropped"][UNREADABLE]["first"]
        console.print(f"[yellow]warning:[/] unreadable, the first: {escape(first)}", highlight=False, soft_wrap=True)
    left = sum(split["documents"] for split in manifest["splits"].values())
    if not left:
        console.print("[yellow]warning:[/] nothing is left: every document was dropped.")
    for name, split in manifest["splits"].items():
        shards = len(split["shards"])
        console.print(
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
            f"{shards} shard{'' if shards == 1 else 's'}",
            highlight=False,
        )
        if left and not split["documents"] and (name != "validation" or manifest["settings"]["validation"]):
            console.print(
                f"[yellow]warning:[/] {name} is empty: too few documents for --validation "
                f"{manifest['settings']['validation']:g}, which is a share of them; give another.",
                highlight=False,
            )
    console.print(f"written: {folder.resolve()}; train on prepared:{folder}", highlight=False, soft_wrap=True)
