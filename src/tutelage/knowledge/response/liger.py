"""Liger's fused kernel in place of our chunks: two heads and a divergence between them on a GPU.

It has not been run on a GPU: this was written on machines without one, where Liger's kernel gave our values and
gradients in Triton's interpreter. So nothing is taken on trust, and the kernel is compared with our own chunks when a
distillation is bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tutelage.errors import require
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.chunks import Eager, Gradients, Hidden, chunked
from tutelage.knowledge.response.generalized_jsd import GeneralizedJSD
from tutelage.knowledge.response.kd import KD

_KERNELS = "liger_kernel.transformers.functional"
_DEVICES = ("cuda",)
_PROBES = 32


@dataclass(frozen=True)
class Fused:
    """One of our losses as Liger says it: factor · ``liger_fused_linear_jsd`` at β and T.

    Liger's is β·KL(p ‖ m) + (1 − β)·KL(q ‖ m) with p the teacher's, the forward KL at β = 0 and the reverse at β = 1,
    both logits divided by T and no T²: that of :func:`tutelage.functional.generalized_jsd`. ``KD`` is T² times it at
    β = 0. It knows no bias and no soft cap. A scale of the logits is put into the states. Its mean over labels other
    than ``ignore_index`` is 0/0 where there are none, so it is given the positions that count and no labels; and its
    backward pass multiplies the kept gradients in place, which a second one would repeat, so they are taken here.

    >>> Fused.of(GeneralizedJSD(beta=0.1))
    Fused(beta=0.1, temperature=1.0, factor=1.0)
    """

    beta: float
    temperature: float
    factor: float = 1.0

    @classmethod
    def of(cls, loss: Loss) -> Fused:
        """What stands for a loss.

        Raises:
            TypeError: Liger's kernel has no such divergence.
        """
        if type(loss) is KD:
            return cls(0.0, loss.temperature, loss.temperature**2)
        if type(loss) is GeneralizedJSD:
            return cls(loss.beta, loss.temperature)
        raise TypeError(f"InChunks: backend='liger': expected KD or GeneralizedJSD, not {type(loss).__name__}")

    def __call__(self, student: Hidden, teacher: Hidden, mask: Tensor | None = None) -> Tensor:
        """The mean over the positions that count, as :func:`tutelage.functional.chunked` gives it."""
        index = slice(None) if mask is None else mask
        mine, theirs = (_rows(hidden.rows(index)) for hidden in (student, teacher))

        def compute(wanted: tuple[bool, ...]) -> tuple[Tensor, Gradients]:
            sides = list(zip((mine.states, mine.weight), wanted[:2], strict=True))
            if not len(mine.states):
                zeros = [torch.zeros_like(x) if w else None for x, w in sides]
                return mine.weight.new_zeros((), dtype=torch.float32), (*zeros, None)
            kernel = require(_KERNELS, extra="liger").liger_fused_linear_jsd
            with torch.set_grad_enabled(any(wanted)):
                leaves = [x.detach().requires_grad_(w) for x, w in sides]
                value = kernel(
                    leaves[0] * mine.scale,
                    leaves[1],
                    theirs.states.detach() * theirs.scale,
                    theirs.weight.detach(),
                    jsd_beta=self.beta,
                    temperature=self.temperature,
                    accum_dtype=torch.float32,
                )
            asked = [x for x in leaves if x.requires_grad]
            found = iter(torch.autograd.grad(value, asked) if asked else ())
            gradients = [self.factor * next(found) if x.requires_grad else None for x in leaves]
            return self.factor * value.detach(), (*gradients, None)

        return Eager.apply(mine.states, mine.weight, None, compute, torch.is_grad_enabled())


def _rows(hidden: Hidden) -> Hidden:
    states = hidden.states.reshape(-1, hidden.states.shape[-1]).to(hidden.weight.dtype)
    return Hidden(states, hidden.weight, hidden.bias, hidden.scale, hidden.softcap)


def check_usable(name: str, student: Hidden, teacher: Hidden) -> None:
    """Refuse what the kernel cannot do.

    Raises:
        ValueError: heads that are not on a CUDA device, or have a bias or a soft cap.
        ImportError: Liger is not installed.
    """
    for who, head in (("student", student), ("teacher", teacher)):
        place = head.weight.device
        if place.type not in _DEVICES:
            raise ValueError(f"{name}: backend='liger': the {who} is on {place}; Liger's kernels run on CUDA only")
        for what, value in (("a bias", head.bias), ("a soft cap", head.softcap)):
            if value is not None:
                raise ValueError(f"{name}: backend='liger': the {who}'s head has {what}, which Liger's kernel has not")
    require(_KERNELS, extra="liger")


def deviation(fused: Fused, formula: Callable[..., Tensor], student: Hidden, teacher: Hidden) -> tuple[float, float]:
    """How far the kernel is from our chunks on a few positions, and how far it may be.

    The student's states are noise of their real size: a student that equals its teacher would leave nothing to compare.

    Returns:
        The largest of value's, states' and weight's gradient's distance, relative to ours; and its bound, 0.1 % in
        float32 and 3 % in half precision, where ours rounds the logits and Liger does not.
    """
    states, theirs = (_rows(hidden).states[:_PROBES].detach() for hidden in (student, teacher))
    noise = torch.randn_like(states) * states.square().mean().sqrt()
    results = []
    for divergence in (fused, lambda *sides: chunked(formula, *sides)):
        with torch.enable_grad():
            leaves = noise.clone().requires_grad_(), student.weight.detach().requires_grad_()
            mine = Hidden(*leaves, scale=student.scale)
            value = divergence(mine, Hidden(theirs, teacher.weight.detach(), scale=teacher.scale))
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    distances = [(a.double() - b.double()).norm() / b.double().norm() for a, b in zip(*results, strict=True)]
    worst = float(torch.stack(distances).max())  # which is NaN if one is, as Python's max is not
    return worst, 1e-3 if torch.finfo(student.weight.dtype).bits >= 32 else 3e-2
