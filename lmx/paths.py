"""Paths as a user writes them."""

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """``path`` with a home folder for ``~`` or ``~name``, as in a shell: where there is no such user, it stays."""
    return Path(os.path.expanduser(path))
