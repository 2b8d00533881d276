"""For losses that remember every training sample: whom a sample is contrasted with, and what all processes saw."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def other_samples(ids: Tensor, samples: int, count: int) -> Tensor:
    """(B, count) numbers of samples drawn uniformly, with replacement, from all but one's own, in ascending order.

    They are the sums of exponential gaps, divided by the sum of them all. Their order means nothing to what is made of
    them, and looking rows up in it goes through a memory once from its begin to its end, which is faster than jumping
    about.

    Args:
        ids: (B,) own numbers.
        samples: how many there are, at least 2.
        count: how many to draw for each.

    >>> other_samples(torch.tensor([0, 1]), samples=2, count=3)
    tensor([[1, 1, 1],
            [0, 0, 0]])
    """
    dtype = torch.float32 if samples < 2**20 else torch.float64  # with 24 bits, some of more numbers come more often
    uniform = torch.rand(len(ids), count + 1, dtype=dtype, device=ids.device)
    places = uniform.neg_().add_(1).log_().cumsum(1)  # 0 may be drawn and 1 is not, and 0 has no logarithm
    drawn = (places[:, :-1] / places[:, -1:] * (samples - 1)).long().clamp_(max=samples - 2)
    return drawn + (drawn >= ids.unsqueeze(1))


def other_classes(labels: Tensor, known: Tensor, count: int) -> Tensor:
    """(B, count) numbers of samples drawn uniformly, with replacement, from those whose label is another.

    One sort of the labels serves the whole batch; each draw is then a look-up, however large or rare its class is.

    Args:
        labels: (B,) own labels; a negative one (no label) excludes nothing.
        known: (N,) labels of all samples; a negative one (not known yet) is another than every own label.
        count: how many to draw for each.

    Raises:
        ValueError: all samples have one of ``labels`` (an assertion of the device, on accelerators).

    >>> other_classes(torch.tensor([1, 0]), torch.tensor([0, 1, 1]), count=3)[0]
    tensor([0, 0, 0])
    """
    ordered, order = known.sort()
    first = torch.searchsorted(ordered, labels)
    excluded = torch.where(labels < 0, 0, torch.searchsorted(ordered, labels, right=True) - first)
    others = len(known) - excluded
    demand((others > 0).all(), "negatives='other classes': all samples have the same label")
    # The remainder of a 62-bit number is uniform to N / 2⁶²; randint has no upper bound per row.
    drawn = torch.randint(2**62, (len(labels), count), device=labels.device) % others.unsqueeze(1)
    return order[drawn + excluded.unsqueeze(1) * (drawn >= first.unsqueeze(1))]


def demand(condition: Tensor, message: str) -> None:
    """Refuse with a ``ValueError`` where a condition does not hold; on accelerators an assertion of the device.

    >>> demand(torch.tensor(True), "never said")
    """
    if condition.device.type == "cpu":
        if not bool(condition):
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)  # no synchronisation of the device


def process_count() -> int:
    """How many processes train together.

    >>> process_count()
    1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(s: Tensor, t: Tensor, numbers: Tensor, log_mean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The batches of all processes one after the other, also of different sizes, and log_mean over their samples.

    Args:
        s: (B, D) rows of the student.
        t: (B, E) rows of the teacher.
        numbers: (B, n) whole numbers that belong to the rows, such as ids and labels.
        log_mean: logarithms of means over this process's B samples.
    """
    head = torch.cat([log_mean.new_tensor([len(s)]), log_mean])
    heads = [torch.empty_like(head) for _ in range(process_count())]
    dist.all_gather(heads, head)
    table = torch.stack(heads)
    sizes = [int(size) for size in table[:, 0].tolist()]

    def gather(rows: Tensor) -> Tensor:
        padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    s, t = gather(torch.cat([s, t], dim=1)).split([s.shape[1], t.shape[1]], dim=1)
    shares = (table[:, :1] / table[:, :1].sum()).log()
    return s, t, gather(numbers), (table[:, 1:] + shares).logsumexp(0)
