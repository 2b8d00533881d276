"""What a network is, in a few digits."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor, nn


def fingerprint(module: nn.Module) -> str:
    """What a network is, in 64 hexadecimal digits: SHA-256 of its class's name, printed structure and state dict.

    Modes, devices, memory formats and the order of the state dict do not count. Code does not either, nor a setting
    that is neither printed nor in the state: two networks of one name, structure and state whose ``forward`` differs
    have the same fingerprint.

    >>> network = nn.Linear(3, 2)
    >>> fingerprint(network) == fingerprint(network.eval()), fingerprint(network) == fingerprint(nn.Linear(3, 2))
    (True, False)
    """
    structure = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(module))
    digest = hashlib.sha256(f"{type(module).__qualname__}\n{structure}".encode())
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"\n{name} {value!r}\n".encode())
    return digest.hexdigest()
