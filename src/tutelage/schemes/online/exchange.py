"""Weights that processes leave for each other in a folder that all of them see."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tutelage.checked import Damaged, read_weights_about, write_weights

_NAME = re.compile(r"peer-(\d+)-step-(\d+)(-last)?\.safetensors")


class Published(NamedTuple):
    """One peer's weights after a number of its steps; ``last`` if it has ended with them."""

    step: int
    last: bool
    path: Path


class DamagedWeights(ValueError):
    """A file of weights that cannot be read; the message names it."""


class Exchange:
    """The folder ``peer-0-step-00000050.safetensors``, ``peer-1-step-00000050.safetensors``, ... of several peers.

    A file is written beside and renamed, so nobody reads half of one. Its step stands in its name and inside.

    Args:
        folder: on a file system that all peers see; made if needed.
        keep: how many files of each peer stay; ``None``: all.

    >>> import tempfile, torch
    >>> exchange = Exchange(tempfile.mkdtemp(), keep=2)
    >>> for step in (10, 20, 30):
    ...     exchange.publish(0, step, {"weight": torch.full((2,), float(step))})
    >>> [found.step for found in exchange.found(0)], exchange.read(exchange.found(0)[-1])["weight"]
    ([20, 30], tensor([30., 30.]))
    """

    def __init__(self, folder: str | Path, keep: int | None = 2):
        self.folder = Path(folder)
        self.keep = keep
        self.folder.mkdir(parents=True, exist_ok=True)

    def found(self, peer: int) -> list[Published]:
        """What a peer has published and is still there, oldest first."""
        named = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        mine = [(name, path) for name, path in named if name is not None and int(name[1]) == peer]
        return sorted(Published(int(name[2]), name[3] is not None, path) for name, path in mine)

    def of_step(self, peer: int, step: int) -> Published | None:
        """What a peer has published at a step, or with what it ended before."""
        return next((p for p in self.found(peer) if p.step == step or (p.last and p.step < step)), None)

    def publish(self, peer: int, step: int, state: dict[str, Tensor], last: bool = False) -> None:
        """Leave a peer's weights for the others."""
        name = f"peer-{peer}-step-{step:08d}{'-last' if last else ''}.safetensors"
        write_weights(self.folder / name, state, step=str(step))
        if self.keep is not None:
            for old in self.found(peer)[: -self.keep]:
                old.path.unlink(missing_ok=True)

    def forget(self, peer: int, after: int) -> None:
        """Remove what a peer published after a step, as it takes these steps again."""
        for published in self.found(peer):
            if published.step > after:
                published.path.unlink(missing_ok=True)

    def read(self, published: Published) -> dict[str, Tensor]:
        """The weights in a file.

        Raises:
            FileNotFoundError: its peer has removed it since, as there are newer ones.
            DamagedWeights: it is no whole file of weights, or of another step than its name says.
        """
        try:
            state, about = read_weights_about(published.path)
        except FileNotFoundError:
            raise
        except Damaged as error:
            raise DamagedWeights(str(error)) from error
        except OSError as error:
            raise DamagedWeights(f"{published.path} cannot be read: {error}") from error
        if (step := about.get("step")) != str(published.step):
            raise DamagedWeights(f"{published.path} says that it is of step {step}")
        return state
