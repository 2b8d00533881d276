from __future__ import annotations

import os
import random
import signal
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tutelage import Distillation, LogitCritic, TaskLoss, Training
from tutelage.run import Epoch, Run, random_state, restore_random, seed_epoch, stop_signals

DATA = TensorDataset(torch.arange(20.0))


def draws():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]  # noqa: NPY002


def test_random_numbers_go_on_where_they_were():
    draws()
    random.gauss(0, 1)
    np.random.normal()  # noqa: NPY002  (both keep a second number back)
    state = random_state()
    ahead = draws(), random.gauss(0, 1), np.random.normal()  # noqa: NPY002
    for _ in range(3):
        draws()
    restore_random(state)
    assert (draws(), random.gauss(0, 1), np.random.normal()) == ahead  # noqa: NPY002


def test_the_random_state_can_be_saved_plainly(tmp_path):
    torch.save(random_state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    ahead = draws()
    restore_random(state)
    assert draws() == ahead


def test_every_epoch_of_every_seed_has_numbers_of_its_own():
    seen = []
    for seed in range(3):
        for epoch in range(-1, 3):
            seed_epoch(seed, epoch, [])
            seen.append(str(draws()))
    assert len(set(seen)) == len(seen)
    seed_epoch(2, 1, [])
    assert str(draws()) == seen[10]


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_an_epochs_order_depends_on_seed_and_epoch_alone(generator):
    loader = DataLoader(DATA, batch_size=4, shuffle=True, generator=generator)

    def order(seed, epoch):
        seed_epoch(seed, epoch, loader)
        return torch.cat([x for (x,) in loader]).tolist()

    first = order(0, 3)
    order(0, 4)
    torch.rand(5)
    assert order(0, 3) == first
    assert order(0, 4) != first
    assert order(1, 3) != first


def test_samplers_are_told_the_epoch():
    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch):
            self.epoch = epoch

    sampler = Sampler(DATA)
    seed_epoch(0, 4, DataLoader(DATA, sampler=sampler))
    assert sampler.epoch == 4
    seed_epoch(0, -1, DataLoader(DATA, sampler=sampler))
    assert sampler.epoch == 4
    batches = torch.utils.data.BatchSampler(Sampler(DATA), 4, drop_last=False)
    seed_epoch(0, 2, DataLoader(DATA, batch_sampler=batches))
    assert batches.sampler.epoch == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number):
    acted = []
    before = signal.signal(number, lambda *_: acted.append(number))
    try:
        with stop_signals() as asked:
            assert asked == []
            os.kill(os.getpid(), number)
            assert (asked, acted) == ([number], [])
            os.kill(os.getpid(), number)
            assert (asked, acted) == ([number], [number])
        os.kill(os.getpid(), number)
        assert acted == [number, number]
    finally:
        signal.signal(number, before)


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), stop_signals():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_signals_are_somebody_elses():
    found = []

    def work():
        with stop_signals() as asked:
            found.append(asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[]]


def test_a_run_notes_its_best():
    run, training = Run(), Training(epochs=5, monitor="nll")
    values = [2.0, 1.0, 1.0, 3.0, 0.5]
    lines = [Epoch(i, i, 0.0, 0.1, {}) for i in range(5)]
    better = [run.validated(line, {"nll": v}, training) for line, v in zip(lines, values, strict=True)]
    assert better == [True, True, False, False, True]
    assert (run.best_epoch, run.best_value, run.since_best) == (4, 0.5, 0)
    assert lines[3].metrics == {"nll": 3.0}
    with pytest.raises(ValueError, match="monitor='nll': the validation has only accuracy, ece"):
        run.validated(lines[0], {"accuracy": 1.0, "ece": 0.0}, training)


def test_a_run_comes_back_from_its_saved_state(tmp_path):
    def parts():
        torch.manual_seed(0)
        d = Distillation(nn.Linear(4, 3), nn.Linear(4, 3), [TaskLoss(), LogitCritic(hidden=4)])
        d.bind((torch.randn(6, 4), torch.arange(6) % 3))
        optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
        return d, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)

    d, optimizer, scheduler = parts()
    for _ in range(3):
        d((torch.randn(6, 4), torch.arange(6) % 3)).total.backward()
        optimizer.step()
        scheduler.step()
    run = Run([Epoch(0, 2, 1.5, 0.1, {"loss": 1.0}, {"nll": 2.0})], step=3, epoch=1, batches=1, best_value=2.0)
    run.sums = {"loss": [3.25, 2]}
    torch.save(run.state(d, [], scheduler), tmp_path / "own.pt")
    state = torch.load(tmp_path / "own.pt", weights_only=True)

    e, _, other = parts()
    restored = Run.restored(state, e, [], other)
    assert restored == run
    assert other.state_dict() == scheduler.state_dict()
    mine, theirs = (x.side_learners()["LogitCritic.critic"] for x in (d, e))
    for a, b in zip(mine.module.parameters(), theirs.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert str(mine.optimizer.state_dict()) == str(theirs.optimizer.state_dict())


def test_an_epochs_line_for_people():
    line = str(Epoch(4, 50, 1.23, 0.1, {"loss": 1.23456, "KD": 2.0}, {"accuracy": 0.75, "ece": 0.1}))
    assert line.split() == ["epoch", "5", "loss", "1.235", "KD", "2", "accuracy", "0.7500", "(1.2", "s)"]
    steps = [Epoch(i, 10 * i, 0.0, 0.1, {}).step for i in range(3)]
    assert all(b - a == 10 for a, b in pairwise(steps))
