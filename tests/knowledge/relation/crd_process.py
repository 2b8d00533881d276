"""One of several processes that train CRD's memory together; run by test_crd.py as a script.

Arguments: rank, number of processes, file to meet at, file to write the memories to.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tutelage import Distillation
from tutelage.knowledge.relation import crd as module
from tutelage.knowledge.relation.crd import CRD
from tutelage.views import Batch, Inputs

CUTS = [(0, 4, 6), (6, 9, 12), (12, 14, 18)]
"""Where the batches of two processes begin and end, step by step: of different and of equal sizes."""


def run(rank: int | None, memory: str) -> dict[str, Tensor]:
    """Three steps, of the rank's part of each batch or (None) of the whole; the memory and the first local means."""
    torch.manual_seed(0)
    inputs, labels, ids = torch.randn(18, 6), torch.arange(18) % 3, torch.arange(18) % 9
    student, teacher = (nn.Sequential(nn.Linear(6, n), nn.Tanh(), nn.Linear(n, 3)) for n in (5, 7))
    crd = CRD(features=4, k=3, queue=10, samples=9, memory=memory, negatives="other classes")

    def batch(step: int) -> Batch:
        first, middle, last = CUTS[step]
        part = slice(first, last) if rank is None else slice(first, middle) if rank == 0 else slice(middle, last)
        return Batch(Inputs((inputs[part],)), Inputs((inputs[part],)), labels[part], ids[part])

    torch.manual_seed(rank or 0)  # the processes draw differently
    d = Distillation(student, teacher, losses=[crd]).bind(batch(0))
    torch.manual_seed(5)  # what data parallelism does for parameters
    for parameter in crd.parameters():
        nn.init.normal_(parameter)
    torch.manual_seed(rank or 0)
    means: list[Tensor] = []
    original = module.log_mean_exp
    module.log_mean_exp = lambda *args: means.append(original(*args)) or means[-1]
    try:
        for step in range(len(CUTS)):
            d(batch(step)).total.backward()
    finally:
        module.log_mean_exp = original
    return {**dict(crd.named_buffers()), "local": torch.stack(means[:2]).detach()}


if __name__ == "__main__":
    rank, world, meet, out = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=int(rank), world_size=int(world))
    torch.save({memory: run(int(rank), memory) for memory in ("bank", "queue")}, out)
    dist.destroy_process_group()
