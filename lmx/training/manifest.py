"""The manifest of a checkpoint: a hash of every file in it, written before it is committed, verified before it is read.

So a checkpoint that is there is whole, and one that has been damaged since is known before any of it is used.
"""

import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lmx.text.fingerprints import THREADS, file_digest

MANIFEST = "manifest.json"
WRITTEN_AT_COMMIT = ("commit_success.txt", "_CHECKPOINT_METADATA")  # by Orbax, later; nothing is read there


def write_manifest(folder: Path) -> None:
    """Writes the manifest of all that ``folder`` holds."""
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in found if name not in (MANIFEST, *WRITTEN_AT_COMMIT)]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(lambda name: file_digest(folder / name), names))
    contents = {"blake2b": dict(zip(names, digests, strict=True))}
    (folder / MANIFEST).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def has_manifest(folder: Path) -> bool:
    """Whether there is a manifest; checkpoints of earlier versions of lmx have none."""
    return (folder / MANIFEST).is_file()


def damaged_files(folder: Path, items: Collection[str] = (), part: int = 0, parts: int = 1) -> list[str]:
    """The files that are missing or have other content than the manifest says, the manifest itself among them.

    Args:
      folder: of the checkpoint.
      items: folders in it to verify; none: all.
      part, parts: only so much of the work, for processes that share it.
    """
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["blake2b"]
        names = [name for name in sorted(digests) if not items or Path(name).parts[0] in items][part::parts]
    except (OSError, ValueError, KeyError, TypeError):
        return [MANIFEST]
    with ThreadPoolExecutor(THREADS) as pool:
        whole = list(pool.map(lambda name: _is_whole(folder / name, digests[name]), names))
    return [name for name, fine in zip(names, whole, strict=True) if not fine]


def _is_whole(path: Path, digest: str) -> bool:
    try:
        return file_digest(path) == digest
    except OSError:
        return False
