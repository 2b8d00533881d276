"""tutelage: knowledge distillation for PyTorch, from the formula to the deployed student."""

import importlib
import importlib.util
from typing import Any

import lazy_loader

__version__ = "0.1.0"
# What there is stands in __init__.pyi, where type checkers read it too; a name is imported when it is first used.
_exported, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return _exported(name)
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    from tutelage.errors import nearest

    raise AttributeError(f"module 'tutelage' has no {name!r}{nearest(name, __all__)}")
