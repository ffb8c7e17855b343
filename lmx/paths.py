"""Paths as a user writes them."""

import os
from pathlib import Path

from lmx.errors import LmxError


def user_path(path: str | os.PathLike[str]) -> Path:
    """``path`` with a home folder for ``~`` or ``~name``, as in a shell: where there is no such user, it stays."""
    return Path(os.path.expanduser(path))


def new_folder(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder that is about to be written; an LmxError where something is there already."""
    folder = user_path(path).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LmxError(f"{folder} exists already and is not overwritten; remove it, or choose another path.")
    return folder
