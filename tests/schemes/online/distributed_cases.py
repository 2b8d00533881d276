"""What test_distributed.py runs in two processes: ``distributed_cases.py FOLDER``, and by itself in one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tutelage import (
    CRD,
    KD,
    Codistillation,
    Cohort,
    DeepMutualLearning,
    Distillation,
    FitNets,
    LogitCritic,
    TaskLoss,
    Training,
    codistill,
)
from tutelage.data import Indexed, shard
from tutelage.engine import fit
from tutelage.run import seed_epoch

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, 6, generator=GENERATOR)
Y = torch.arange(64) % 3
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 64, 8)]
PLAIN = {"scheduler": "constant", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.0}


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def net(width, seed=0, norm=False):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(width)] if norm else []
    return nn.Sequential(nn.Linear(6, width), *middle, nn.ReLU(), nn.Linear(width, 3))


def settings(**changes):
    return Training(**{"epochs": 3, "progress": False, "cpu": True, **PLAIN, **changes})


def mutual(out, target="each", norm=False):
    """A cohort with half batches in each of two processes, or whole ones in one; labels missing unevenly."""
    labels = Y.clone()
    labels[8:16] = -100
    train = DataLoader(TensorDataset(X, labels), batch_size=16 // world())
    cohort = Cohort([net(5, 1, norm), net(7, 2, norm), net(4, 3, norm)])
    d = Distillation(cohort, DeepMutualLearning(target), losses=[TaskLoss(), KD(temperature=2.0)])
    made = fit(d, train, None, training=settings(), out=out)
    return made.last, [line.losses for line in made.history]


def pairs(out):
    """Losses that own something for each pair of peers: regressors, and critics with an optimiser of their own."""
    train = DataLoader(TensorDataset(X, Y), batch_size=16 // world())
    cohort = Cohort([net(5, 1), net(7, 2), net(5, 3)])
    losses = [TaskLoss(), FitNets("1", weight=1.0), LogitCritic(hidden=8, weight=0.1)]
    d = Distillation(cohort, DeepMutualLearning(), losses=losses)
    fit(d, train, None, training=settings(), out=out)
    critics = {name: learner.module.state_dict() for name, learner in d.side_learners().items()}
    return dict(d.state_dict()), critics, [name for name, _ in d.named_parameters()]


def banks():
    """A bank after one pass over all samples with weights that stand still, and what it learns next."""
    torch.manual_seed(4)
    student, teacher = net(5, 1), net(9, 2)
    crd = CRD("1", features=4, k=6, samples=64)
    d = Distillation(student, teacher, losses=[crd]).bind((X[:4], Y[:4], torch.arange(4))).train()
    part = 16 // world()
    rank = dist.get_rank() if world() > 1 else 0
    seen, order = [], torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for whole in order.split(16):
        ids = whole[rank * part : (rank + 1) * part]
        d((X[ids], Y[ids], ids))
        seen.append([crd.memory_student.clone(), crd.memory_teacher.clone()])
    return seen, crd.log_mean


def codistilled(folder: Path, peer: int):
    """Two peers in the user's own loop, the process's rank being its number."""
    networks = [net(5), net(6)]
    role = Codistillation(folder, peer, 2, every=3, burn_in=5, lockstep=True, patience=60, networks=networks)
    student = net(5 + peer, seed=peer)
    batches = shard(BATCHES, peer, 2)
    seed_epoch(peer, -1, batches)  # as the engine does before it binds: of the regressor's first weights
    d = Distillation(student, role, losses=[*role.losses(), FitNets("1", weight=0.5)]).bind(batches[0]).train()
    # of parameters that exist after binding, the regressor's among them
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
    values = []
    for step in range(16):
        losses = d(batches[step % 4])
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        values.append({name: float(value) for name, value in losses.values.items()})
    role.end()
    return student.state_dict(), values, list(role.seen)


def codistilled_in_one():
    """The same with the engine, both peers in turn."""
    role = Codistillation(every=3, burn_in=5)
    student, other = net(5, seed=0), net(6, seed=1)
    losses = [*role.losses(), FitNets("1", weight=0.5)]
    how = {"epochs": 4, "progress": False, "cpu": True, "gradient_shares": False, **PLAIN}
    results = codistill(student, role, BATCHES, others=[other], losses=losses, **how)
    return [results[1], results[0]]


def refused() -> str:
    """The engine in two processes would average the peers' gradients."""
    role = Codistillation("nowhere", 0, 2)
    try:
        fit(Distillation(net(5), role, losses=role.losses()), BATCHES, None, training=settings())
    except ValueError as error:
        return str(error)
    return "not refused"


def indexed(out):
    """CRD's bank of each pair of peers, with the engine."""
    train = DataLoader(Indexed(TensorDataset(X, Y)), batch_size=16 // world(), shuffle=True)
    cohort = Cohort([net(5, 1), net(7, 2)])
    d = Distillation(cohort, DeepMutualLearning(), losses=[TaskLoss(), CRD("1", features=4, k=6)])
    fit(d, train, None, training=settings(), out=out)
    return dict(d.state_dict()), [name for name, _ in d.named_parameters()]


def main(out: Path) -> None:
    # The own loop first: afterwards accelerate has taken the processes for one training
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {"codistilled": codistilled(out / "exchange", rank), "banks": banks()}
    found["mutual"] = mutual(out / "mutual")
    found["ensemble"] = mutual(out / "ensemble", target="ensemble")
    found["norms"] = mutual(out / "norms", norm=True)
    found["indexed"] = indexed(out / "indexed")
    found["pairs"] = pairs(out / "pairs")
    found["refused"] = refused()
    torch.save(found, out / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
