"""lmx: language models in JAX. ``lmx.load(path)`` opens a trained one.

Nothing heavy is imported until it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmx.config import Config
    from lmx.language_model import LanguageModel, load

__version__ = "0.1.0"
__all__ = ["Config", "LanguageModel", "__version__", "load"]

_HOMES = {"Config": "lmx.config", "LanguageModel": "lmx.language_model", "load": "lmx.language_model"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lmx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
