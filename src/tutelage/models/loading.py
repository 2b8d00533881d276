"""Models by name, and their weights from and to files."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import nearest, require
from tutelage.models import (
    cifar_resnet,
    dense,
    mobilenetv2,
    shufflenet_v1,
    shufflenet_v2,
    small,
    small_language,
    small_transformer,
    vgg,
    wide_resnet,
)

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    build.__name__: build
    for build in (
        cifar_resnet.resnet8,
        cifar_resnet.resnet14,
        cifar_resnet.resnet20,
        cifar_resnet.resnet32,
        cifar_resnet.resnet44,
        cifar_resnet.resnet56,
        cifar_resnet.resnet110,
        cifar_resnet.resnet8x4,
        cifar_resnet.resnet32x4,
        mobilenetv2.mobilenetv2_half,
        shufflenet_v1.shufflenetv1,
        shufflenet_v2.shufflenetv2,
        dense.SmallDetector,
        dense.SmallKeypoints,
        small.MLP,
        small.SmallCNN,
        small_language.SmallLSTM,
        small_language.SmallLanguageModel,
        small_transformer.SmallTransformer,
        vgg.vgg8,
        vgg.vgg11,
        vgg.vgg13,
        vgg.vgg16,
        vgg.vgg19,
        wide_resnet.wrn_16_1,
        wide_resnet.wrn_16_2,
        wide_resnet.wrn_40_1,
        wide_resnet.wrn_40_2,
    )
}

# Fields under which training scripts keep the weights beside the optimiser's state.
WRAPPERS = ("state_dict", "model_state_dict", "model")


def create(spec: str, **kwargs: Any) -> nn.Module:
    """A model by name.

    Args:
        spec: one of
            ``"resnet20"`` or ``"tutelage:resnet20"``: that function of ``tutelage.models``;
            ``"timm:resnet18"``: ``timm.create_model``;
            ``"torchvision:resnet18"``: ``torchvision.models.get_model``;
            ``"transformers:<folder or name>"``: ``from_pretrained`` of ``AutoModelForSequenceClassification``
            if ``num_labels`` is given or the checkpoint is one, else of ``AutoModel``;
            ``"package.module:callable"``: whatever that returns, which must be a module.
        kwargs: passed on.

    Raises:
        ValueError: for a name that is not there (the nearest are named), or a spec of another form.
        TypeError: if a callable returns something other than a module.
        ImportError: if a package is missing.

    >>> type(create("resnet8", num_classes=5)).__name__
    'CifarResNet'
    >>> create("wrn_40_3")
    Traceback (most recent call last):
    ...
    ValueError: tutelage has no model 'wrn_40_3'; nearest: 'wrn_40_2', 'wrn_40_1', 'wrn_16_2'
    """
    source, colon, name = spec.partition(":")
    if not colon:
        source, name = "tutelage", spec
    if not source or not name:
        raise ValueError(f"model {spec!r} must be a name or 'source:name', for instance 'timm:resnet18'")
    if source == "tutelage":
        _known(source, name, BUILDERS)
        return BUILDERS[name](**kwargs)
    if source == "timm":
        timm = require("timm", extra="vision")
        # A tag after a dot names the weights, not the architecture.
        if not timm.is_model(name.split(".")[0]):
            _known(source, name, timm.list_models())
        return timm.create_model(name, **kwargs)
    if source == "torchvision":
        library = require("torchvision.models", extra="vision")
        _known(source, name, library.list_models())
        return library.get_model(name, **kwargs)
    if source == "transformers":
        return _transformer(name, kwargs)
    return _called(source, name, kwargs)


def _known(source: str, name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name not in names:
        raise ValueError(f"{source} has no model {name!r}{nearest(name, names)}")


def _transformer(name: str, kwargs: dict[str, Any]) -> nn.Module:
    library = require("transformers", extra="text")
    kwargs = {"trust_remote_code": False, **kwargs}  # without it transformers asks on the terminal, with a time limit
    try:
        config = library.AutoConfig.from_pretrained(name, trust_remote_code=kwargs["trust_remote_code"])
    except OSError as error:
        raise ValueError(f"transformers has no model {name!r}, as a folder or on the hub: {error}") from error
    classifier = any("ForSequenceClassification" in a for a in config.architectures or ())
    kind = library.AutoModelForSequenceClassification if classifier or "num_labels" in kwargs else library.AutoModel
    return kind.from_pretrained(name, **kwargs)


def _called(source: str, name: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        module = importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name != source and not source.startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"model {source + ':' + name!r}: {source!r} is neither tutelage, timm, torchvision, transformers "
            "nor a module that can be imported"
        ) from error
    build: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(build):
        choices = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise ValueError(f"{source} has no callable {name!r}{nearest(name, choices)}")
    model = build(**kwargs)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{source}:{name} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def load_weights(model: nn.Module, path: str | Path, strict: bool = True) -> tuple[list[str], list[str]]:
    """Read a checkpoint into ``model``, in place; nothing in the file is executed.

    Reads safetensors, and ``torch.save`` files of a state dict, also one kept under ``state_dict``,
    ``model_state_dict`` or ``model``; a prefix ``module.`` that all names share is removed. The model is
    untouched if the file does not fit.

    Args:
        model: of the same architecture.
        path: the file; safetensors by its suffix ``.safetensors``.
        strict: whether every name must be on both sides. Shapes must fit in any case.

    Returns:
        The names missing in the file and those the model does not have; both empty where ``strict``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint, is damaged, or one of another architecture.
    """
    path = Path(path)
    state = _read(path)
    own = model.state_dict()
    # Of tensors that share memory a file may hold one, under either name.
    present = {_place(own[name]) for name in own if name in state}
    missing = [name for name, tensor in own.items() if name not in state and _place(tensor) not in present]
    # Sorted, as safetensors keeps no order.
    unexpected = sorted(name for name in state if name not in own)
    reshaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    if reshaped or (strict and (missing or unexpected)):
        reasons = []
        if missing:
            reasons.append(f"{len(missing)} missing in the file: {_some(missing)}")
        if unexpected:
            reasons.append(f"{len(unexpected)} not in the model: {_some(unexpected)}")
        if reshaped:
            first = reshaped[0]
            reasons.append(
                f"{len(reshaped)} of another shape, first {first!r}: "
                f"{tuple(state[first].shape)} in the file, {tuple(own[first].shape)} in the model"
            )
        raise ValueError(f"{path} is not a checkpoint of this {type(model).__name__}; " + "; ".join(reasons))
    model.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
    return missing, unexpected


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the parameters and buffers of ``model`` as safetensors with a checksum, beside and then renamed.

    Tensors that share memory are written once. Read with ``load_weights``.

    Raises:
        ValueError: for a path that does not end in ``.safetensors``.
    """
    from tutelage.checked import write_weights

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in '.safetensors', got {path.name!r}")
    state, places = {}, set()
    for name, tensor in model.state_dict().items():
        if (place := _place(tensor)) not in places:
            places.add(place)
            state[name] = tensor
    write_weights(path, state)


def _place(tensor: Tensor) -> object:
    # Tensors without storage (empty, or on the meta device) share nothing.
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return object()
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is not a checkpoint: the file is empty")
    if path.suffix == ".safetensors":
        from tutelage.checked import read_weights

        return read_weights(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle can make the unpickler raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of plain tensors: {reason}") from error
    for field in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(field), Mapping):
            content = content[field]
            break
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    ):
        raise ValueError(f"{path} is not a state dict: expected names with tensors, got {type(content).__name__}")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return dict(content)
