from __future__ import annotations

import copy
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tutelage import CRD, KD, Distillation, FitNets, LogitCritic, Loss, TaskLoss, Training, evaluate
from tutelage.data import ArrayLoader, CropFlip, Indexed
from tutelage.engine import fit
from tutelage.progress import Meter, NonFiniteLoss
from tutelage.run import Interrupted

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(48, 6, generator=GENERATOR)
Y = torch.arange(48) % 3
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)


def batches(size=8, x=X, y=Y):
    ids = torch.arange(len(x))
    return [(x[i : i + size], y[i : i + size], ids[i : i + size]) for i in range(0, len(x), size)]


def mlp(width, seed=0, drop=0.0, norm=False):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(width)] if norm else []
    return nn.Sequential(nn.Linear(6, width), *middle, nn.ReLU(), nn.Dropout(drop), nn.Linear(width, 3))


def cnn(width, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 64, 3)
    )


def settings(**changes):
    return Training(**{"epochs": 2, "progress": False, "cpu": True, "checkpoint_every": None, **changes})


def run(student=None, teacher=None, train=None, validation=None, losses=None, views=None, out=None, **changes):
    """One training; returns the distillation and the run."""
    how = {k: changes.pop(k) for k in ("resume", "overwrite") if k in changes}
    d = Distillation(student or mlp(5), teacher or mlp(9, seed=1), losses, views)
    train = batches() if train is None else train
    return d, fit(d, train, validation, training=settings(**changes), out=out, **how)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def history(made):
    return [{k: v for k, v in vars(line).items() if k != "seconds"} for line in made.history]


# the loop is the loop that one would write


def test_the_loop_is_the_one_written_by_hand():
    student, teacher = mlp(5), mlp(9, seed=1)
    twin = copy.deepcopy(student)
    _, made = run(student, teacher, epochs=3, lr=0.2, scheduler="constant")
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for epoch in range(3):
        costs = []
        for x, y, _ in batches():
            with torch.no_grad():
                targets = (teacher(x) / 4).softmax(1)
            logits = twin(x)
            kl = (targets * (targets.log() - (logits / 4).log_softmax(1))).sum(1).mean()
            task = F.cross_entropy(logits, y)
            cost = 0.1 * task + 0.9 * 16 * kl
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()
            costs.append([cost.item(), task.item(), 16 * kl.item()])
        means = np.mean(costs, axis=0)
        got = made.history[epoch]
        assert [got.losses[n] for n in ("loss", "TaskLoss", "KD")] == pytest.approx(means.tolist(), rel=1e-4, abs=1e-6)
        assert got.step == 6 * (epoch + 1)
    close(student.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    same(made.last, student.state_dict())


def test_a_shuffled_loader_has_the_order_of_its_seed():
    class Notes(Loss):
        default_reads, needs_teacher = "nothing", False

        def forward(self, student, teacher, batch):
            if self.training:
                Notes.seen.extend(batch.ids.tolist())
            return student.logits.pow(2).mean()

    def order(seed):
        Notes.seen = []
        data = DataLoader(Indexed(TensorDataset(X, Y)), batch_size=8, shuffle=True)
        run(train=data, losses=[Notes()], seed=seed)
        return Notes.seen

    first = order(0)
    assert len(first) == 96
    assert sorted(first[:48]) == sorted(first[48:]) == list(range(48))
    assert first[:48] != first[48:]
    torch.manual_seed(99)
    assert order(0) == first
    assert order(1) != first


def test_steps_epochs_and_data_without_a_length():
    assert run(epochs=2)[1].step == 12
    made = run(epochs=None, steps=8)[1]
    assert (made.step, [line.step for line in made.history]) == (8, [6, 8])
    assert run(epochs=1, accumulate=4)[1].step == 2

    class Endless:
        def __iter__(self):
            while True:
                yield X[:8], Y[:8]

    with pytest.raises(ValueError, match="no length: give steps"):
        run(train=Endless())
    assert run(train=Endless(), epochs=None, steps=5)[1].step == 5


def test_empty_loaders_are_refused():
    with pytest.raises(ValueError, match="the loader is empty"):
        run(train=[])
    with pytest.raises(ValueError, match="the loader is empty"):
        run(train=DataLoader(TensorDataset(X, Y), batch_size=64, drop_last=True))
    with pytest.raises(ValueError, match="no batch in this epoch"):
        run(train=iter(batches(48)), epochs=None, steps=5)


class Watched(torch.optim.SGD):
    """SGD that writes down the learning rate of every step, and can be cut off before one."""

    def __init__(self, parameters, lr=0.1, cut=None, **options):
        super().__init__(parameters, lr=lr, momentum=0.9, **options)
        self.rates, self.cut = [], cut

    def step(self, closure=None):
        if len(self.rates) == self.cut:
            raise OSError("power cut")
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0.1] * 16),
        ("cosine", [0.05 * (1 + math.cos(math.pi * i / 16)) for i in range(16)]),
        ("step", [0.1] * 10 + [0.01] * 2 + [0.001] * 2 + [0.0001] * 2),
        (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), [0.1 * 0.5**i for i in range(16)]),
    ],
)
def test_learning_rates(scheduler, expected):
    made = []

    def optimizer(parameters):
        made.append(Watched(parameters))
        return made[0]

    _, result = run(epochs=None, steps=16, optimizer=optimizer, scheduler=scheduler, lr=0.1)
    assert made[0].rates == pytest.approx(expected)
    assert result.history[-1].lr == pytest.approx(made[0].param_groups[0]["lr"])


def test_one_cycle_rises_and_falls():
    made = []
    run(epochs=None, steps=20, optimizer=lambda p: made.append(Watched(p)) or made[0], scheduler="onecycle", lr=0.3)
    rates = made[0].rates
    peak = rates.index(max(rates))
    assert len(rates) == 20
    assert max(rates) == pytest.approx(0.3, rel=0.05)
    assert 0 < peak < 19
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.02


def test_adamw_is_adamw():
    student = mlp(5)
    twin = copy.deepcopy(student)
    run(student, losses=[TaskLoss()], optimizer="adamw", lr=0.01, weight_decay=0.1, scheduler="constant", epochs=1)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    for x, y, _ in batches():
        optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
    close(student.state_dict(), twin.state_dict())


def test_clipping_bounds_the_step():
    def moved(clip):
        student = mlp(5)
        before = copy.deepcopy(student)
        run(student, epochs=None, steps=1, lr=1.0, momentum=0.0, weight_decay=0.0, scheduler="constant", clip=clip)
        return (
            sum((p - q).pow(2).sum() for p, q in zip(student.parameters(), before.parameters(), strict=True))
            .sqrt()
            .item()
        )

    assert moved(None) > 0.1
    assert moved(0.01) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_precisions_follow_each_other_in_one_program(precision):
    """Also: losses are float32, autocast is off afterwards, and the student stays float32."""

    class Types(Loss):
        def forward(self, student, teacher, batch):
            Types.seen |= {student.logits.dtype, teacher.logits.dtype, student.output.dtype}
            return (student.logits - teacher.logits).pow(2).mean()

    Types.seen = set()
    for now in ("no", precision):
        d, made = run(losses=[Types()], precision=now)
    assert (torch.bfloat16 in Types.seen) == (precision == "bf16")
    assert d.student(X).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in d.parameters())
    d(batches()[0])
    assert d.observer(d.views(batches()[0]).student).output.dtype == torch.float32
    assert math.isfinite(made.history[-1].losses["loss"])


def test_channels_last_trains_the_same():
    loader = ArrayLoader(IMAGES, np.arange(40) % 3, batch_size=8, shuffle=True)
    plain = run(cnn(4), cnn(6, 1), loader)[1].last
    student, teacher = cnn(4), cnn(6, 1)
    strided = run(student, teacher, loader, channels_last=True)[1].last
    assert student[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert teacher[0].weight.is_contiguous(memory_format=torch.channels_last)
    close(plain, strided, rtol=1e-4, atol=1e-5)


def test_tensorboard_gets_every_term(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(out=tmp_path / "run", validation=batches(), trackers=["tensorboard"], log_every=2)
    events = EventAccumulator(str(tmp_path / "run" / "tutelage"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/TaskLoss", "train/KD", "validation/accuracy", "validation/nll"} <= set(tags)
    assert [e.step for e in events.Scalars("train/KD")] == [2, 4, 6, 8, 10, 12]
    assert [e.step for e in events.Scalars("validation/nll")] == [6, 12]
    run(out=tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "tutelage").exists()


# accumulation


@pytest.mark.parametrize("case", ["equal", "unequal last batch", "uneven labels"])
def test_one_times_eight_is_eight_times_one(case):
    x, y = (X, Y.clone()) if case != "unequal last batch" else (X[:43], Y[:43].clone())
    if case == "uneven labels":
        y[:7] = -100
        y[20:21] = -100
    weights, losses = [], []
    for size, accumulate in ((8, 1), (1, 8), (2, 4)):
        data = batches(size, x, y)
        d, made = run(train=data, losses=[TaskLoss(weight=0.5), KD(weight=0.9)], accumulate=accumulate, epochs=3)
        assert made.step == 18
        weights.append(d.student.state_dict())
        losses.append(made.history[0].losses)
    close(weights[0], weights[1], rtol=1e-4, atol=1e-6)
    close(weights[0], weights[2], rtol=1e-4, atol=1e-6)
    if case == "equal":  # the history speaks of whole batches, not of their shares
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_step_without_any_label_changes_nothing():
    student = mlp(5)
    before = copy.deepcopy(student.state_dict())
    empty = batches(4, X[:16], torch.full((16,), -100))
    run(student, train=empty, losses=[TaskLoss()], accumulate=2, weight_decay=0.0, epochs=1)
    same(student.state_dict(), before)


# exact resume


LOSSES = {
    "kd": lambda: [TaskLoss(), KD()],
    "hint": lambda: [TaskLoss(), FitNets("0", weight=0.1)],
    "critic": lambda: [TaskLoss(), LogitCritic(hidden=8)],
    "crd": lambda: [TaskLoss(), CRD(features=4, k=7)],
}


class Noisy(Dataset):
    """Draws random numbers for each item, as augmentations do."""

    def __len__(self):
        return 48

    def __getitem__(self, i):
        return X[i] + 0.1 * torch.randn(6) + 0.1 * float(np.random.rand()), Y[i], i  # noqa: NPY002


def shuffled(workers=0):
    return DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=workers)


def images():
    return ArrayLoader(IMAGES, np.arange(40) % 3, batch_size=8, shuffle=True, augment=CropFlip(1))


CASES = {
    "list": {},
    "shuffled": {"train": shuffled},
    "own generator": {
        "train": lambda: DataLoader(Noisy(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5))
    },
    "workers": {"train": lambda: shuffled(2)},
    "arrays": {"train": images, "student": lambda: cnn(3), "teacher": lambda: cnn(5, 1), "per_epoch": 5},
    "dropout": {"student": lambda: mlp(5, drop=0.5, norm=True)},
    "hint": {"losses": LOSSES["hint"]},
    "critic": {"losses": LOSSES["critic"]},
    "crd": {"losses": LOSSES["crd"], "train": lambda: DataLoader(Indexed(TensorDataset(X, Y)), 8, shuffle=True)},
    "accumulate": {"train": lambda: batches(4), "accumulate": 2, "per_epoch": 6},
    "onecycle": {"scheduler": "onecycle"},
    "step": {"scheduler": "step"},
    "adamw": {"optimizer": torch.optim.AdamW},
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("where", ["between", "inside"])
def test_resume_is_exact(name, where, tmp_path):
    case = dict(CASES[name])
    make = {k: case.pop(k, default) for k, default in (("train", batches), ("student", lambda: mlp(5, drop=0.2)))}
    teacher, losses = case.pop("teacher", lambda: mlp(9, seed=1)), case.pop("losses", LOSSES["kd"])
    per_epoch = case.pop("per_epoch", 6)
    inner = case.pop("optimizer", torch.optim.SGD)
    cut = per_epoch if where == "between" else per_epoch + 4
    every = None if where == "between" else 3

    def train(out, cut=None, resume=False):
        class Cut(inner):
            count = 0

            def step(self, closure=None):
                if self.count == cut:
                    raise OSError("power cut")
                self.count += 1
                return super().step(closure)

        student = make["student"]()
        result = fit(
            Distillation(student, teacher(), losses()),
            make["train"](),
            batches() if name != "arrays" else None,
            training=settings(
                epochs=3, checkpoint_every=every, optimizer=lambda p: Cut(p, lr=0.1), log_every=2, **case
            ),
            out=out,
            resume=resume,
        )
        return student.state_dict(), result

    expected, whole = train(tmp_path / "whole")
    with pytest.raises(OSError, match="power cut"):
        train(tmp_path / "cut", cut=cut)
    torch.manual_seed(1234)
    np.random.seed(7)  # noqa: NPY002
    got, resumed = train(tmp_path / "cut", resume=True)
    same(got, expected)
    same(resumed.last, whole.last)
    assert history(resumed) == history(whole)
    assert (resumed.best_value, resumed.best_epoch) == (whole.best_value, whole.best_epoch)
    ends = [sorted((tmp_path / n / "checkpoints").glob("*"))[-1] for n in ("whole", "cut")]
    states = [torch.load(end / "optimizer.bin", weights_only=True) for end in ends]
    assert str(states[0]) == str(states[1])
    for key, value in states[0]["state"].items():
        for field in value:
            if isinstance(value[field], torch.Tensor):
                assert torch.equal(value[field], states[1]["state"][key][field])
    if name == "critic":
        sides = [torch.load(e / "own-0.pt", weights_only=True)["side_learners"]["LogitCritic.critic"] for e in ends]
        same(sides[0]["module"], sides[1]["module"])
    if name == "crd":
        same(*(load_file(end / "model.safetensors") for end in ends))


def test_a_finished_run_is_returned_again(tmp_path):
    d, made = run(out=tmp_path / "run", validation=batches(), epochs=3)
    calls = []

    class Never(torch.optim.SGD):
        def step(self, closure=None):
            calls.append(1)
            return super().step(closure)

    e, again = run(mlp(5, seed=77), out=tmp_path / "run", validation=batches(), epochs=3, resume=True)
    same(e.student.state_dict(), d.student.state_dict())
    assert history(again) == history(made)
    same(again.best, made.best)
    same(again.last, made.last)
    assert calls == []


def test_resume_of_nothing_begins(tmp_path):
    plain = run()[1].last
    same(run(out=tmp_path / "run", resume=True)[1].last, plain)


class Sends:
    """A loader whose n-th batch comes with a signal."""

    def __init__(self, number, at):
        self.number, self.at, self.count = number, at, 0

    def __len__(self):
        return 6

    def __iter__(self):
        for batch in batches():
            self.count += 1
            if self.count == self.at + 1:  # binding has taken one
                os.kill(os.getpid(), self.number)
            yield batch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step_with_a_checkpoint(number, tmp_path):
    whole = run(epochs=3)[1]
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"stopped at step 8 of 18: a checkpoint is in .*run, go on with resume"):
        run(train=Sends(number, 8), epochs=3, out=tmp_path / "run")
    assert signal.getsignal(number) is before
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000008"]
    resumed = run(epochs=3, out=tmp_path / "run", resume=True)[1]
    same(resumed.last, whole.last)
    assert history(resumed) == history(whole)


def test_a_signal_during_the_validation_is_not_forgotten(tmp_path):
    class Validation:
        def __iter__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return iter(batches())

    with pytest.raises(Interrupted, match="step 6 of 12"):
        run(out=tmp_path / "run", validation=Validation())
    resumed = run(out=tmp_path / "run", validation=batches(), resume=True)[1]
    assert history(resumed) == history(run(validation=batches())[1])


@pytest.mark.parametrize("ends", ["signal", "crash"])
def test_an_end_at_the_very_last_step_loses_nothing(ends, tmp_path):
    whole = run(epochs=3, validation=batches())[1]

    class Fails:
        left = 2

        def __iter__(self):
            self.left -= 1
            if self.left < 0:
                raise OSError("power cut")
            return iter(batches())

    if ends == "signal":
        with pytest.raises(Interrupted, match="stopped at step 18 of 18"):
            run(train=Sends(signal.SIGTERM, 18), epochs=3, validation=batches(), out=tmp_path / "run")
    else:
        with pytest.raises(OSError, match="power cut"):
            run(epochs=3, validation=Fails(), out=tmp_path / "run", checkpoint_every=1)
    resumed = run(epochs=3, validation=batches(), out=tmp_path / "run", resume=True)[1]
    same(resumed.last, whole.last)
    assert history(resumed) == history(whole)


def test_the_same_batch_twice_in_one_step():
    """Data that make themselves give one tensor several times; only the last one ends the step."""
    ends = []

    class Noting(Meter):
        def add(self, losses, raw, step_ended):
            ends.append(step_ended)
            super().add(losses, raw, step_ended)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tutelage.engine.Meter", Noting)
        run(train=[X[:8]] * 8, losses=[KD()], accumulate=4, epochs=1)
    assert ends == [False, False, False, True] * 2


def test_without_a_folder_a_signal_says_so():
    with pytest.raises(Interrupted, match="no folder was given"):
        run(train=Sends(signal.SIGINT, 3))


def test_an_inner_checkpoint_at_the_last_step_of_an_epoch_survives_a_crash_at_its_end(tmp_path, monkeypatch):
    """The checkpoint inside the epoch and the one at its end are of one step; the second must not spoil the first."""
    whole = run(epochs=2)[1]
    saved, count = Accelerator.save_state, []

    def fails(self, *args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        return saved(self, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "save_state", fails)
    with pytest.raises(OSError, match="No space"):
        run(out=tmp_path / "run", checkpoint_every=6)
    folder = tmp_path / "run" / "checkpoints"
    assert [p.name for p in folder.glob("step*")] == ["step-00000006"]
    resumed = run(out=tmp_path / "run", checkpoint_every=6, resume=True)[1]
    same(resumed.last, whole.last)
    assert len(list(folder.iterdir())) == 1


# other architecture, other losses


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"student": lambda: mlp(7)}, "parameters"),
        ({"student": lambda: nn.Linear(6, 3)}, "student"),
        ({"losses": lambda: [TaskLoss()]}, "losses"),
    ],
)
def test_resume_of_something_else_is_refused_and_changes_nothing(changed, match, tmp_path):
    run(out=tmp_path / "run")
    files = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    made = {k: v() for k, v in changed.items()}
    student = made.get("student") or mlp(5, seed=3)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=rf"resume: the run in .* has {match}"):
        run(**{**made, "student": student}, out=tmp_path / "run", resume=True)
    same(student.state_dict(), before)
    assert {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()} == files


# not a number


class Breaks(Loss):
    """Becomes NaN or infinite in the n-th batch of training."""

    def __init__(self, at, value=math.nan):
        super().__init__()
        self.at, self.value, self.count = at, value, 0

    def forward(self, student, teacher, batch):
        if self.training and torch.is_grad_enabled():
            self.count += 1
        return (student.logits - teacher.logits).pow(2).mean() * (self.value if self.count == self.at else 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_term_that_is_no_number_stops_the_run(value, accumulate, tmp_path):
    with pytest.raises(NonFiniteLoss) as caught:
        run(
            losses=[TaskLoss(), Breaks(9, value)],
            train=batches(8 // accumulate),
            accumulate=accumulate,
            out=tmp_path / "run",
            checkpoint_every=1,
            log_every=100,
        )
    step = (9 - 1) // accumulate + 1
    first = (9 - 1) * (8 // accumulate) % 48
    assert "loss term Breaks is not finite" in str(caught.value)
    assert str(list(range(first, first + 8 // accumulate))) in str(caught.value)
    assert "inputs are finite" in str(caught.value)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step - 1:08d}"]


def test_the_last_look_comes_before_the_epochs_files(tmp_path):
    with pytest.raises(NonFiniteLoss):
        run(losses=[Breaks(12)], out=tmp_path / "run", log_every=100, validation=batches())
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000006"]
    assert len(json.loads((tmp_path / "run" / "history.json").read_text())) == 1
    weights = load_file(tmp_path / "run" / "student-last.safetensors")
    assert all(torch.isfinite(v).all() for v in weights.values())


def test_inputs_that_are_no_numbers_are_named():
    bad = batches()
    bad[3][0][2, 1] = math.nan
    try:
        with pytest.raises(NonFiniteLoss, match=r"\[24, 25, .*inputs contain NaN") as caught:
            run(train=bad)
        assert "TaskLoss, KD" in str(caught.value)
    finally:
        X[26, 1] = 0.5
    with pytest.raises(NonFiniteLoss, match="unknown"):
        run(train=[(x, y) for x, y, _ in batches()], losses=[Breaks(2)])


def test_the_device_is_waited_for_only_now_and_then(monkeypatch):
    """CPU tensors, so every way of reading one stands for a synchronisation."""
    calls = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _original=original, **kwargs):
            calls.append(1)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def count(**changes):
        calls.clear()
        run(**{"epochs": None, "scheduler": "constant", "log_every": 10**6, **changes})
        return len(calls)

    data = batches() * 4  # so that it is one epoch
    ten = count(steps=10, train=data)
    assert count(steps=20, train=data) == ten
    assert count(steps=20, train=data, clip=1.0) == count(steps=10, train=data, clip=1.0)
    assert count(steps=10, train=data, accumulate=2) == ten
    assert count(steps=20, train=data, log_every=5) > ten


# the teacher


def test_the_teacher_never_changes_and_is_nowhere(tmp_path):
    student = mlp(5, norm=True)
    teacher = mlp(9, seed=1, drop=0.5, norm=True)
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    checks = []

    class Validation:
        def __iter__(self):
            checks.append((not any(m.training for m in teacher.modules()), student.training))
            same(teacher.state_dict(), before)
            teacher.train()  # somebody plays with it between two epochs
            return iter(batches())

    optimizers = []

    def optimizer(parameters):
        optimizers.append(torch.optim.SGD(parameters, lr=0.1))
        return optimizers[0]

    losses = [TaskLoss(), KD(), FitNets("0", weight=0.1)]
    run(student, teacher, losses=losses, out=tmp_path / "run", validation=Validation(), epochs=3, optimizer=optimizer)
    assert len(checks) == 3
    assert all(in_eval for in_eval, _ in checks)
    same(teacher.state_dict(), before)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    theirs = {id(p) for p in teacher.parameters()}
    held = [p for group in optimizers[0].param_groups for p in group["params"]]
    assert not theirs & {id(p) for p in held}
    assert len(held) == len(list(student.parameters())) + 2  # and the hint's projector
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    names = load_file(checkpoint / "model.safetensors")
    assert all(n.startswith(("student.", "losses.")) for n in names)
    assert not any(v.shape == teacher[0].weight.shape for n, v in names.items() if n.startswith("student"))
    assert torch.load(checkpoint / "own-0.pt", weights_only=True)["teacher"] == {}
    fresh = mlp(5, seed=9, norm=True)
    fresh.load_state_dict(load_file(tmp_path / "run" / "student-last.safetensors"), strict=True)
    same(fresh.state_dict(), student.state_dict())


def test_choosing_where_to_read_does_not_change_the_teacher():
    teacher = mlp(9, seed=1, norm=True).train()
    before = copy.deepcopy(teacher.state_dict())
    run(mlp(5, norm=True), teacher, losses=[CRD(features=4, memory="queue", queue=8)])
    same(teacher.state_dict(), before)


# validation


def test_validation_leaves_the_student_as_it_was():
    modes, buffers = [], []
    student = mlp(5, norm=True, drop=0.3)

    class Validation:
        def __iter__(self):
            buffers.append(copy.deepcopy(dict(student.named_buffers())))
            yield from batches()
            modes.append([m.training for m in student.modules()])

    class Watch(Loss):
        default_reads, needs_teacher = "nothing", False

        def forward(self, student_record, teacher, batch):
            if torch.is_grad_enabled():
                modes.append([m.training for m in student.modules()])
            return student_record.logits.pow(2).mean()

    _, made = run(student, losses=[Watch()], validation=Validation())
    assert modes[6] == [False] * 6  # while it is evaluated
    assert modes[5] == modes[7] == [True] * 6
    same(buffers[1], {n: b for n, b in made.last.items() if "running" in n or "batches" in n})
    plain = mlp(5, norm=True, drop=0.3)
    run(plain, losses=[Watch()])
    same(plain.state_dict(), student.state_dict())


def scripted(*values):
    """A validation set on which the student is seen to be as good as ``values`` say, one after the other."""

    class Validation:
        def __init__(self):
            self.left = list(values)

        def __iter__(self):
            right = self.left.pop(0)
            return iter([(X[:10], torch.where(torch.arange(10) < right, TRUTH["student"](X[:10]).argmax(1), 3))])

    return Validation()


TRUTH: dict = {}


def four():
    """A student with a class that no sample has, to make mistakes at will."""
    torch.manual_seed(0)
    student = nn.Linear(6, 4)
    with torch.no_grad():
        student.bias[3] = -50.0
    TRUTH["student"] = student
    return student


def four_teacher():
    torch.manual_seed(1)
    return nn.Linear(6, 4)


def test_best_and_last_are_those_of_their_epochs(tmp_path):
    states = []

    student = four()
    validation = scripted(3, 8, 5, 8)
    original = validation.__class__.__iter__

    def noting(self):
        states.append(copy.deepcopy(student.state_dict()))
        return original(self)

    validation.__class__.__iter__ = noting
    _, made = run(student, four_teacher(), validation=validation, epochs=4, out=tmp_path / "run")
    assert [line.metrics["accuracy"] for line in made.history] == pytest.approx([0.3, 0.8, 0.5, 0.8])
    assert (made.best_epoch, made.best_value) == (1, pytest.approx(0.8))
    same(made.best, states[1])
    same(made.last, states[3])
    same(load_file(tmp_path / "run" / "student-best.safetensors"), states[1])
    same(load_file(tmp_path / "run" / "student-last.safetensors"), states[3])
    same(student.state_dict(), states[3])
    assert any(not torch.equal(states[1][k], states[3][k]) for k in states[1])


def test_patience_stops_at_the_right_epoch_also_after_resume(tmp_path):
    values = (3, 8, 5, 8, 4, 9)
    _, made = run(four(), four_teacher(), validation=scripted(*values), epochs=6, patience=3)
    assert [line.epoch for line in made.history] == [0, 1, 2, 3, 4]
    assert made.best_epoch == 1

    def cut(parameters):
        return Watched(parameters, cut=20)

    with pytest.raises(OSError, match="power cut"):
        run(
            four(),
            four_teacher(),
            validation=scripted(*values),
            epochs=6,
            patience=3,
            out=tmp_path / "run",
            optimizer=cut,
        )
    for left in (values[3:], ()):
        _, resumed = run(
            four(),
            four_teacher(),
            validation=scripted(*left),
            epochs=6,
            patience=3,
            out=tmp_path / "run",
            resume=True,
            optimizer=Watched,
        )
        assert [line.epoch for line in resumed.history] == [0, 1, 2, 3, 4]
        assert (resumed.best_epoch, resumed.since_best) == (1, 3)


@pytest.mark.parametrize("monitor", ["nll", "agreement", "teacher_kl"])
def test_the_monitored_figure_chooses(monitor):
    teacher = mlp(9, seed=1)
    d, made = run(teacher=teacher, validation=batches(), epochs=5, monitor=monitor, lr=0.5, scheduler="constant")
    values = [line.metrics[monitor] for line in made.history]
    best = max(values) if monitor == "agreement" else min(values)
    assert made.best_value == best
    assert made.best_epoch == values.index(best)
    d.student.load_state_dict(made.best)
    assert evaluate(d.student, batches(), teacher).known()[monitor] == pytest.approx(best)


def test_a_figure_that_there_is_not_is_named():
    with pytest.raises(ValueError, match=r"monitor='top5': the validation has only accuracy"):
        run(validation=batches(), monitor="top5")


def test_validation_every_other_epoch_and_at_the_end():
    made = run(validation=batches(), epochs=5, evaluate_every=2)[1]
    assert [bool(line.metrics) for line in made.history] == [False, True, False, True, True]


def test_data_that_makes_itself_is_given_the_networks_and_saved(tmp_path):
    class Counts:
        total = 0

        def attach(self, student, teacher):
            self.networks = student, teacher

        def __len__(self):
            return 3

        def __iter__(self):
            for _ in range(3):
                self.total += 1
                yield X[:4], Y[:4]

        def own_state(self):
            return {"total": self.total}

        def load_own_state(self, state):
            self.total = state["total"]

    data, again = Counts(), Counts()
    d, _ = run(train=data, out=tmp_path / "run")
    assert data.networks == (d.student, d.teacher.module)
    assert data.total == 7  # two epochs, and the one batch that binding looks at
    run(train=again, out=tmp_path / "run", resume=True)
    assert again.total == 7
