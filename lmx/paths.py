"""Paths as a user writes them."""

import os
from pathlib import Path

from lmx.errors import ConfigError, LmxError

LFS = b"version https://git-lfs"  # how such a note begins


def user_path(path: str | os.PathLike[str]) -> Path:
    """``path`` with a home folder for ``~`` or ``~name``, as in a shell: where there is no such user, it stays."""
    return Path(os.path.expanduser(path))


def is_lfs_pointer(path: Path) -> bool:
    """Whether Git left a note in the place of the file, because it was cloned without Git LFS."""
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def new_folder(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder that is about to be written; an LmxError where something is there already."""
    folder = user_path(path).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LmxError(f"{folder} exists already and is not overwritten; remove it, or choose another path.")
    return folder


def check_output_folder(path: str | os.PathLike[str] | None) -> None:
    """Raises :class:`ConfigError` where no folder can be, or be made; before the work whose results it is to hold."""
    if path is None:
        return
    folder = Path(path).resolve()
    found = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not found.is_dir():
        raise ConfigError(f"{str(path)!r} cannot be a folder: {found} is a file.")


def check_output(path: str | os.PathLike[str] | None) -> None:
    """Raises :class:`ConfigError` where no file can be written; before the work whose result it is to hold."""
    if path is None:
        return
    file = Path(path).resolve()
    if not file.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {Path(path).parent}; make it first.")
    if file.is_dir():
        raise ConfigError(f"{str(path)!r} cannot be written: it is a folder; name a file in it.")
