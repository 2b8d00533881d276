"""What data-free methods share: a network that draws images, and the data role that trains it while it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tutelage.beside import SideLearner


class Generator(nn.Module):
    """Latent vectors → images: linear, two times upsampling and 3×3 convolution, one more convolution, batch norm.

    The last batch norm has no learned scale, so that every channel of a batch has mean 0 and variance 1, as
    normalised photographs have. This is the network of ZSKT's authors; DAFL's has a tanh before the last norm.

    Args:
        image_shape: (C, H, W) of one image, at least 2 × 2 pixels; the sides need not be multiples of 4.
        latent: the length of a latent vector.
        width: channels of the first convolution; the second has half of them.
        tanh: bound the values before the last norm.

    Raises:
        ValueError: ``image_shape`` is not three positive numbers, or another argument is too small.

    >>> generator = Generator((3, 30, 28), latent=16, width=8)
    >>> generator(torch.randn(4, 16)).shape
    torch.Size([4, 3, 30, 28])
    """

    def __init__(self, image_shape: Sequence[int], latent: int = 100, width: int = 128, tanh: bool = False):
        super().__init__()
        if len(image_shape) != 3 or min(image_shape) < 1 or min(image_shape[1:]) < 2:
            raise ValueError(
                f"image_shape={tuple(image_shape)}: expected (channels, height, width) of 2 pixels or more"
            )
        if latent < 1 or width < 2:
            raise ValueError(f"latent={latent}, width={width}: expected at least 1 and 2")
        channels, height, across = image_shape
        self.image_shape = (channels, height, across)
        self.latent = latent
        start = (width, -(-height // 4), -(-across // 4))
        self.layers = nn.Sequential(
            nn.Linear(latent, start[0] * start[1] * start[2]),
            nn.Unflatten(1, start),
            nn.BatchNorm2d(width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Upsample(size=(height, across)),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.BatchNorm2d(width // 2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2, channels, 3, padding=1),
            nn.Tanh() if tanh else nn.Identity(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of latent vectors (B, latent)."""
        return self.layers(z)


class GeneratedData:
    """The data role of a method that makes its own images: an epoch of ``steps`` batches of images, without labels.

    The engine calls :meth:`attach` before training. Iterating then trains the generator and gives detached images;
    student, teacher, their modes and their buffers stay as they are, and no gradient is left on them. The noise
    comes from torch's global CPU generator; of several processes, which draw the same, each takes its share.

    A subclass says with :meth:`generate` how one set of images is made.

    Args:
        generator: the network that is trained, with its ``latent``.
        steps: batches in an epoch.
        batch_size: images in a batch.
        lr: of the generator's Adam.
        repeats: how many batches in a row are the same images.

    Attributes:
        batch_size: as given.
        learner: the generator with its optimiser, once attached.
    """

    def __init__(self, generator: Generator, steps: int, batch_size: int, lr: float, repeats: int = 1):
        for name, value in (("steps", steps), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name}={value}: expected 1 or more")
        if not lr > 0:
            raise ValueError(f"{type(self).__name__}: lr={lr}: expected a positive number")
        self.generator = generator
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.repeats = repeats
        self._learner: SideLearner | None = None
        self._networks: tuple[nn.Module, nn.Module] | None = None
        self._images: Tensor | None = None
        self._given = 0
        self._replay = 0

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Take the two networks, already on their device. A second call keeps the generator as it is trained.

        Raises:
            ValueError: there is no teacher network to learn from.
        """
        if not isinstance(teacher, nn.Module):
            raise ValueError(
                f"{type(self).__name__} needs one frozen network as teacher (the images are made for it), got "
                f"{type(teacher).__name__}"
            )
        self._networks = student, teacher
        if self._learner is None:
            self._learner = SideLearner(self.generator, lambda p: torch.optim.Adam(p, lr=self.lr))
        self._learner.to(self.device).train()

    @property
    def learner(self) -> SideLearner:
        self._attached()
        assert self._learner is not None
        return self._learner

    @property
    def student(self) -> nn.Module:
        return self._attached()[0]

    @property
    def teacher(self) -> nn.Module:
        """The teacher, in eval mode whatever somebody did to it."""
        teacher = self._attached()[1]
        if any(m.training for m in teacher.modules()):
            teacher.eval()
        return teacher

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    def noise(self) -> Tensor:
        """Standard normal latent vectors (batch_size, latent)."""
        several = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        return torch.randn(self.batch_size * world, self.generator.latent)[rank::world].to(self.device)

    def generate(self) -> Tensor:
        """Train the generator and return detached images (batch_size, C, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it makes images")

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        replay, self._replay = self._replay, 0
        for number in range(self.steps):
            if number >= replay and number % self.repeats == 0:
                with torch.enable_grad():
                    self._images = self.generate()
            self._given = number + 1  # before it is given, so that a checkpoint made with it counts it
            assert self._images is not None
            yield self._images
        self._given = 0

    def own_state(self) -> dict[str, Any]:
        """Generator, optimiser, and the position inside the epoch, for the checkpoint of a run."""
        given = self._given % self.steps
        return {"learner": self.learner.own_state(), "given": given, "images": self._images if given else None}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`own_state` gave.

        Of an epoch that was interrupted, the next iteration gives as many batches as had been given without learning
        or drawing noise, so that skipping them, as one does with a loader, leads to where it stopped.
        """
        self.learner.load_own_state(state["learner"])
        self._replay = state["given"]
        self._images = None if state["images"] is None else state["images"].to(self.device)

    def _attached(self) -> tuple[nn.Module, nn.Module]:
        if self._networks is None:
            raise RuntimeError(
                f"{type(self).__name__} makes images for a student and a teacher: call attach(student, teacher) before "
                "iterating (tutelage.distill does)"
            )
        return self._networks


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put a module's buffers (running averages) back at the end."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
