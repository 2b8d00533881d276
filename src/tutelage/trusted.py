"""Which names a recipe may say: what lies in trusted places, and nothing through which those unpickle or fetch code."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

import tutelage
from tutelage import data as tutelage_data
from tutelage import models
from tutelage.errors import nearest

# Places and not whole packages: nearly every library has functions somewhere that run a command, unpickle a file or
# fetch code. Models of other libraries come through `create`, data through `tutelage.data`.
TRUSTED = (
    *(
        f"tutelage.{part}"
        for part in ("algorithms", "applications", "architecture", "cache", "data", "knowledge", "models")
    ),
    *(f"tutelage.{part}" for part in ("schemes", "schedule", "teachers", "training", "views")),
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
)
LIBRARIES = ("tutelage", "timm", "torchvision", "transformers")
# Fields that those libraries read code or pickles by.
RUN_CODE = (
    *("trust_remote_code", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "weights_only"),
    *("allow_all_kernels", "use_kernels", "kernel_config"),
)


class RecipeError(ValueError):
    """A mistake in a recipe: which field, what was wrong, and the nearest right name."""


def named_object(path: str, trusted: Iterable[str] = TRUSTED) -> Any:
    """The class or function that a dotted path names, if it is defined in a trusted place.

    Nothing is imported from anywhere else: not the packages of other names, nor other modules of trusted packages.

    Args:
        path: as in an import: ``"tutelage.KD"``, ``"torch.optim.AdamW"``.
        trusted: packages and modules; a module's name stands for everything inside it.

    Raises:
        RecipeError: it is defined elsewhere, there is no such name, or it is neither class nor function.

    >>> named_object("tutelage.KD").__name__
    'KD'
    >>> named_object("os.system")
    Traceback (most recent call last):
    ...
    tutelage.trusted.RecipeError: 'os.system': a recipe may not use 'os' unless you trust it: --trust os
    """
    trusted = tuple(trusted)
    parts = path.split(".")
    root = parts[0]
    if not all(part.isidentifier() and not part.startswith("_") for part in parts):
        raise RecipeError(f"{path!r}: expected a dotted path of public names, such as torch.optim.AdamW")
    if root not in {place.split(".")[0] for place in trusted}:
        raise _untrusted(path, root)
    if importlib.util.find_spec(root) is None:
        raise RecipeError(f"{path!r}: the package {root!r} is not installed")
    found: Any = importlib.import_module(root)
    for end, part in enumerate(parts[1:], 2):
        inner = ".".join(parts[:end])
        outside = not hasattr(found, part) and isinstance(found, types.ModuleType)
        if outside and _leads(inner, trusted) and _is_module(inner):
            importlib.import_module(inner)
        # A method may do anything with what a recipe gives it as self: WeightsEnum.get_state_dict of torchvision
        # unpickles whatever lies at self.url. Methods of what the user trusts are the user's business.
        if not isinstance(found, types.ModuleType) and _within(str(getattr(found, "__module__", "")), TRUSTED):
            raise RecipeError(f"{path!r}: expected a class or function of a module, and no part of one")
        if not hasattr(found, part):
            choices = [name for name in dir(found) if not name.startswith("_")]
            raise RecipeError(f"{path!r}: no {part!r} in {'.'.join(parts[: end - 1])}{nearest(part, choices)}")
        found = getattr(found, part)
        # torch.os.system is reached through a trusted package, and lies in another
        if isinstance(found, types.ModuleType) and not _leads(found.__name__, trusted):
            raise _untrusted(path, found.__name__)
    # and a function may have been imported from another
    home = getattr(found, "__module__", None)
    if isinstance(home, str) and not _within(home, trusted):
        raise _untrusted(path, home)
    if not isinstance(home, str) or not (inspect.isclass(found) or inspect.isroutine(found)):
        raise RecipeError(f"{path!r}: it is neither a class nor a function of a trusted module")
    return library_model if found is models.create else found


def _untrusted(path: str, home: str) -> RecipeError:
    return RecipeError(f"{path!r}: a recipe may not use {home!r} unless you trust it: --trust {home}")


def _within(name: str, places: Iterable[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _leads(name: str, trusted: Iterable[str]) -> bool:
    """Whether a module lies in a trusted place, or such a place in it."""
    return _within(name, trusted) or any(_within(place, (name,)) for place in trusted)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what it would be inside is no package
        return False


def library_model(spec: str, **kwargs: Any) -> nn.Module:
    """``models.create`` as recipes may call it: of libraries alone."""
    source = spec.partition(":")[0] if ":" in spec else "tutelage"
    if source not in LIBRARIES:
        raise RecipeError(
            f"spec={spec!r}: expected a model of {', '.join(LIBRARIES)}; name one of your own by class_path"
        )
    return models.create(spec, **kwargs)


def full_name(name: str) -> str:
    """``KD`` is short for ``tutelage.KD``, ``resnet20`` for ``tutelage.models.resnet20``."""
    if "." in name:
        return name
    packages = (tutelage, models, tutelage_data)
    for package in packages:
        if name in package.__all__:
            return f"{package.__name__}.{name}"
    choices = [choice for package in packages for choice in package.__all__]
    raise RecipeError(f"no {name!r} in tutelage, its models or its data{nearest(name, choices)}")


def runs_code(field: str, value: Any, passed_on: bool) -> bool:
    """Whether a library would read code or a pickle by this argument; ``passed_on``: it goes there as it is."""
    if field == "attn_implementation":  # a repository of kernels on the hub
        return "/" in str(value)
    return (passed_on and field in RUN_CODE) or (field, value) == ("source", "pandas")
