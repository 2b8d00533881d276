"""What makes a method of the catalogue, or a packaged recipe, on any pair of networks."""

from __future__ import annotations

import copy
from typing import Any

from tutelage.building import RecipeError
from tutelage.catalogue import methods as catalogued
from tutelage.errors import nearest
from tutelage.recipe import COMPARED, packaged_names, read

# What of a recipe is the method; everything else is the setting that all methods share.
METHOD_FIELDS = ("losses", "stages", "source", "procedure")


def method_fields(name: str, shared: dict[str, Any] | None = None) -> dict[str, Any]:
    """What makes a method on any pair: the losses of its packaged recipe without that recipe's addresses.

    Each loss then reads the best-matching stages. A recipe whose method needs more than losses says what in its field
    ``in_comparison``. Stages are scaled to the epochs and the learning rate of the ``shared`` recipe, so that together
    they are as long as every other method's training.

    Raises:
        RecipeError: no such method, one that needs fields of its own, or one with more stages than there are epochs.

    >>> method_fields("AttentionTransfer")["losses"][1]
    {'class_path': 'AttentionTransfer'}
    """
    method = next((m for m in catalogued() if m.name == name), None)
    recipe = read(method.recipe if method else name)
    if COMPARED in recipe:
        return recipe[COMPARED]
    unusual = [f for f in ("source", "procedure", "views") if recipe.get(f) is not None]
    if unusual or (method is not None and method.role not in ("losses", "schedule")):
        what = " and ".join(unusual) or (method.role if method else "")
        raise RecipeError(f"{name}: it changes the {what}; give the fields that make it on your pair under methods")
    found = {k: copy.deepcopy(recipe[k]) for k in METHOD_FIELDS if recipe.get(k) is not None}
    for loss in (*found.get("losses", ()), *(loss for s in found.get("stages", ()) for loss in s["losses"])):
        _without_taps(loss)
    if stages := found.get("stages"):
        (epochs, lr), (_, own_lr) = _epochs_and_lr(shared or {}), _epochs_and_lr(recipe)
        if epochs is not None and epochs < len(stages):
            raise RecipeError(f"{name}: it has {len(stages)} stages, and training.epochs={epochs}")
        if epochs is not None:
            for stage, part in zip(stages, _shares([stage["epochs"] for stage in stages], epochs), strict=True):
                stage["epochs"] = part
        for stage in stages:
            if "lr" in stage:  # as a part of the whole run's
                stage["lr"] = stage["lr"] * lr / own_lr
    return found


def known_method(name: str) -> str:
    """The catalogue's name of a method, or a recipe's, however it is written."""
    known = {plain_name(m.recipe): m.name for m in catalogued()} | {plain_name(m.name): m.name for m in catalogued()}
    known = {plain_name(r): r for r in packaged_names()} | known
    if plain_name(name) in known:
        return known[plain_name(name)]
    choices = [m.name for m in catalogued()]
    raise RecipeError(f"methods: {name!r} is no method of the catalogue and has no fields{nearest(name, choices)}")


def plain_name(name: str) -> str:
    """A method's name without what people write differently."""
    return name.lower().removesuffix(".yaml").replace("_", "").replace("-", "")


def _shares(parts: list[int], whole: int) -> list[int]:
    """Whole numbers of that sum in about these proportions, none of them 0; of equal remainders the first is raised.

    >>> _shares([2, 6], 6), _shares([2, 6], 2), _shares([1, 98, 1], 10)
    ([2, 4], [1, 1], [1, 8, 1])
    """
    exact = [part * whole / sum(parts) for part in parts]
    found = [max(1, int(e)) for e in exact]
    while (lack := whole - sum(found)) != 0:
        away = [e - f for e, f in zip(exact, found, strict=True)]
        place = away.index(max(away)) if lack > 0 else min((a, n) for n, a in enumerate(away) if found[n] > 1)[1]
        found[place] += 1 if lack > 0 else -1
    return found


def _epochs_and_lr(fields: dict[str, Any]) -> tuple[int | None, float]:
    """Of a recipe's training, as far as it has epochs."""
    training = fields.get("training")
    if training is None:
        return 10, 0.05
    if not isinstance(training, dict):
        raise RecipeError(f"training={training!r}: expected settings, such as {{epochs: 10}}")
    epochs, lr = training.get("epochs"), training.get("lr", 0.05)
    if not isinstance(epochs, int | None):
        raise RecipeError(f"training.epochs={epochs!r}: expected a whole number")
    if not isinstance(lr, int | float):
        raise RecipeError(f"training.lr={lr!r}: expected a number")
    return epochs, lr


def _without_taps(loss: Any) -> None:
    if not isinstance(loss, dict):  # a name alone
        return
    arguments = loss.get("init_args") or {}
    arguments.pop("taps", None)
    if not arguments:
        loss.pop("init_args", None)
