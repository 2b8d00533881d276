"""How logits are written down: as they are, in half the size, in a byte each, or the likeliest classes alone.

==========  ===================================  =============================================================
codec       bytes of one row of C logits         what comes back
==========  ===================================  =============================================================
float32     4·C                                  the logits, bit for bit
float16     2·C                                  the nearest half-precision number
int8        C + 8                                one of 256 equal steps between the row's lowest and highest
top_k       6·k + 8 (8·k + 8 above 65,536)       log p of the k likeliest at T, and the mass of all others in equal
                                                 parts
==========  ===================================  =============================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tutelage.knowledge.base import class_axis

Name = Literal["float32", "float16", "int8", "top_k"]
NAMES = ("float32", "float16", "int8", "top_k")
Field = tuple[str, Any, tuple[int, ...]]


@dataclass(frozen=True)
class Codec:
    """One way to write logits (B, C), (B, T, C) or (B, C, H, W) down; the last two are many rows of C.

    ``int8`` is affine with a scale and an offset for each row: z ≈ lo + q·(hi − lo)/255, wrong by half a step at most.
    ``top_k`` keeps log p_c = log softmax(z/T)_c of the k likeliest classes and the log of the tail, the summed mass of
    all others. What comes back are the logits T·log p_c, and T·log(tail/(C − k)) for each of the others, so that
    softmax(·/T) has exactly the stored masses; at another temperature the others weigh more than they should. The raw
    logits' level is lost.

    Args:
        name: of the codec.
        k: of top_k, 1 or more; more than there are classes means all of them.
        temperature: T > 0 of top_k, that of the losses that will read it; the error is measured at it. For the others
            it is 1.

    Raises:
        ValueError: an unknown name, or ``k`` or ``temperature`` out of range.

    >>> codec, logits = Codec("top_k", k=2), torch.tensor([[3.0, 2.0, 1.0, 1.0]])
    >>> back = codec.decode({name: torch.from_numpy(v) for name, v in codec.encode(logits).items()}, logits.shape[1:])
    >>> torch.allclose(back.softmax(1), logits.softmax(1))
    True
    """

    name: Name = "float16"
    k: int = 10
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"codec={self.name!r}: expected one of {', '.join(NAMES)}")
        if self.k < 1:
            raise ValueError(f"k={self.k}: expected 1 or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: expected a positive number")

    @property
    def about(self) -> dict[str, Any]:
        """What has to agree for two to be the same."""
        more = {"k": self.k, "temperature": float(self.temperature)} if self.name == "top_k" else {}
        return {"name": self.name, **more}

    def fields(self, shape: tuple[int, ...]) -> list[Field]:
        """Names, numpy types and shapes of what is kept for one sample whose logits have this shape."""
        *rows, classes = _last(torch.empty((1, *shape), device="meta")).shape[1:]
        positions = tuple(rows)
        if self.name == "float32":
            return [("logits", "<f4", (*positions, classes))]
        if self.name == "float16":
            return [("logits", "<f2", (*positions, classes))]
        if self.name == "int8":
            return [("steps", "u1", (*positions, classes)), ("low", "<f4", positions), ("step", "<f4", positions)]
        kept = (*positions, min(self.k, classes))
        index = "<u2" if classes <= 65_536 else "<u4"
        found: list[Field] = [("classes", index, kept), ("logs", "<f4", kept), ("tail", "<f4", positions)]
        return [*found, ("mass", "<f4", ())]

    def encode(self, logits: Tensor) -> dict[str, np.ndarray]:
        """What is kept of logits (B, ...), by field.

        Raises:
            ValueError: logits that are not finite, or too large for float16, for int8 (a row's range is beyond float32)
                or for top_k (log p is).
        """
        z = _last(logits.detach().float()).cpu()
        if not bool(torch.isfinite(z).all()):
            raise ValueError("the teacher's logits are NaN or infinite: nothing is kept of them")
        if self.name == "float32":
            return {"logits": z.numpy()}
        if self.name == "float16":
            return {"logits": in_float16(z, "the teacher's logits", "take codec float32")}
        if self.name == "int8":
            low, high = z.amin(-1, keepdim=True), z.amax(-1, keepdim=True)
            _hold(z, high - low)
            step = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
            steps = ((z - low) / step).round().clamp(0, 255).to(torch.uint8)
            return {"steps": steps.numpy(), "low": low[..., 0].numpy(), "step": step[..., 0].numpy()}
        log_p = (z / self.temperature).log_softmax(-1)
        _hold(z, log_p)
        logs, classes = log_p.topk(min(self.k, z.shape[-1]), dim=-1)
        # a sum over the others, as 1 − Σ loses all digits of a small rest
        tail = log_p.scatter(-1, classes, -torch.inf).logsumexp(-1)
        mass = 1 - tail.exp().reshape(len(z), -1).mean(1)
        index = np.uint16 if z.shape[-1] <= 65_536 else np.uint32
        found = {"classes": classes.numpy().astype(index), "logs": logs.numpy()}
        return {**found, "tail": tail.numpy(), "mass": mass.numpy()}

    def decode(self, kept: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Logits (B, *shape) in float32, from what :meth:`encode` gave as tensors."""
        if self.name in ("float32", "float16"):
            z = kept["logits"].float()
        elif self.name == "int8":
            z = kept["low"][..., None] + kept["steps"].float() * kept["step"][..., None]
        else:
            count = shape[0] if len(shape) > 2 else shape[-1]
            others = count - kept["logs"].shape[-1]
            each = kept["tail"] - math.log(max(others, 1))
            z = each[..., None].expand(*each.shape, count).scatter(-1, kept["classes"].long(), kept["logs"])
            z = z * self.temperature
        return z.movedim(-1, 1) if len(shape) > 2 else z

    def nats(self, logits: Tensor, back: Tensor) -> Tensor:
        """KL(softmax(z/T) ‖ softmax(ẑ/T)) of logits and what came back of them: (B,), the mean over positions."""
        log_p, log_q = ((_last(z.detach()).cpu().double() / self._at).log_softmax(-1) for z in (logits, back))
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
        return divergence.reshape(len(divergence), -1).mean(1)

    @property
    def _at(self) -> float:
        return self.temperature if self.name == "top_k" else 1.0


def in_float16(values: Tensor, what: str, instead: str) -> np.ndarray:
    """Finite values as float16, or a ``ValueError`` where there are some that it cannot hold."""
    if bool((values.abs() > torch.finfo(torch.float16).max).any()):
        raise ValueError(f"{what} reach {float(values.abs().max()):.4g}, more than float16 holds: {instead}")
    return values.to(torch.float16).numpy()


def _hold(logits: Tensor, derived: Tensor) -> None:
    if not bool(torch.isfinite(derived).all()):
        raise ValueError(
            f"the teacher's logits reach {float(logits.abs().max()):.4g}, more than this codec holds: take float32"
        )


def _last(logits: Tensor) -> Tensor:
    return logits.movedim(class_axis(logits), -1)
