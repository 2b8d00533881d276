from __future__ import annotations

import copy
import io
import pickle
from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage import (
    KD,
    Cohort,
    DeepMutualLearning,
    Distillation,
    FitNets,
    LogitCritic,
    Loss,
    Losses,
    NoTeacher,
    Ramp,
    StopAt,
    TaskLoss,
    Training,
    WarmUp,
)
from tutelage.beside import SideLearner
from tutelage.connectors import projector
from tutelage.engine import fit
from tutelage.functional import kd_divergence
from tutelage.taps import UnknownTap
from tutelage.views import UNLABELLED, Altered, Paired

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
BATCH = X, Y


class Hint(Loss):
    """Mean squared distance of projected features: the smallest loss that owns something."""

    default_reads = "embedding"

    def build(self, student, teacher, batch):
        self.maps = nn.ModuleList(projector(s.shape, t.shape) for s, t in self.tensors(student, teacher))

    def forward(self, student, teacher, batch):
        pairs = self.tensors(student, teacher)
        return sum(F.mse_loss(m(s), t) for m, (s, t) in zip(self.maps, pairs, strict=True)) / len(pairs)


class Remembers(Loss):
    needs_ids = True
    needs_teacher = False
    default_reads = "nothing"

    def build(self, student, teacher, batch):
        self.register_buffer("seen", torch.zeros(batch.population or 100))

    def forward(self, student, teacher, batch):
        if self.training:
            self.seen[batch.ids] += 1
        return student.logits.pow(2).mean()


class Compares(Loss):
    needs_samples = 2

    def forward(self, student, teacher, batch):
        return (student.logits.std(0) - teacher.logits.std(0)).pow(2).mean()


def mlp(width: int, classes: int = 3, drop: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, width),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.Dropout(drop),
        nn.Linear(width, classes),
    )


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return mlp(5), mlp(7)


def hooks(*models: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models for m in model.modules())


# binding changes nothing


@pytest.mark.parametrize("fails", [False, True])
def test_binding_leaves_models_and_random_numbers_as_they_were(fails):
    student, teacher = mlp(5, drop=0.5), mlp(7, drop=0.5)
    student[1].eval()  # a fine-tuner's frozen batch norm, in a model that trains
    modes = [m.training for m in student.modules()]
    states = [copy.deepcopy(m.state_dict()) for m in (student, teacher)]
    d = Distillation(student, teacher, [TaskLoss(), KD(), Hint("0" if not fails else ("0", "0#2"))])
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(UnknownTap):
            d.bind(BATCH)
    else:
        d.bind(BATCH)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in student.modules()] == modes
    for model, state in zip((student, teacher), states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert hooks(student, teacher) == 0


def test_views_that_draw_random_numbers_are_no_exception(pair):
    random = torch.get_rng_state()
    Distillation(*pair, views=Altered(student=lambda x: x + torch.randn_like(x))).bind(BATCH)
    assert torch.equal(torch.get_rng_state(), random)


def test_buffers_that_a_model_replaces_are_put_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x):
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)  # a new tensor, not an in-place change
            return self.fc(x - self.mean)

    student = Counts()
    Distillation(student, mlp(7)).bind(BATCH)
    assert torch.equal(student.mean, torch.zeros(6))


def test_losses_come_out_of_binding_in_the_mode_of_the_distillation(pair):
    for training in (True, False):
        d = Distillation(copy.deepcopy(pair[0]), pair[1], [Hint("0")])
        d.train(training)
        d.bind(BATCH)
        assert all(m.training is training for m in d.modules())


def test_binding_does_not_write_into_memories(pair):
    ids = torch.arange(8)
    d = Distillation(*pair, [TaskLoss(), Remembers()]).bind((X, Y, ids), population=50)
    memory = d.losses["Remembers"].seen
    assert memory.shape == (50,)
    assert memory.sum() == 0
    d((X, Y, ids))
    assert memory.sum() == 8


def test_binding_again_does_nothing_and_calling_binds(pair):
    d = Distillation(*pair, [Hint("0")])
    d(BATCH)
    projectors = list(d.losses.parameters())
    assert projectors
    assert d.bind(BATCH) is d
    assert [id(p) for p in d.losses.parameters()] == [id(p) for p in projectors]


def test_after_a_refusal_a_good_batch_binds(pair):
    d = Distillation(*pair, [TaskLoss(), KD(), Hint("0")])
    with pytest.raises(ValueError, match="labels"):
        d.bind(X)
    with pytest.raises(ValueError, match="class 9"):
        d.bind((X, torch.full((8,), 9)))
    d.bind(BATCH)
    d(BATCH).total.backward()
    assert len(list(d.losses.parameters())) == 2


# one step


def test_a_step_is_the_step_written_by_hand(pair):
    student, teacher = pair
    twin = copy.deepcopy(student)
    d = Distillation(student, teacher, [TaskLoss(weight=0.3), KD(temperature=3.0, weight=0.7)]).bind(BATCH)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (d, twin))
    for _ in range(5):
        losses = d(BATCH)
        losses.total.backward()
        ours.step()
        ours.zero_grad()

        logits = twin(X)
        with torch.no_grad():
            targets = (teacher(X) / 3.0).softmax(1)
        kl = (targets * (targets.log() - (logits / 3.0).log_softmax(1))).sum(1).mean()
        task = F.cross_entropy(logits, Y)
        total = 0.3 * task + 0.7 * 9.0 * kl
        total.backward()
        theirs.step()
        theirs.zero_grad()

        torch.testing.assert_close(losses.total, total)
        torch.testing.assert_close(losses["TaskLoss"], task.detach())
        torch.testing.assert_close(losses["KD"], 9.0 * kl.detach(), rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(student.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_what_a_step_gives_back(pair):
    d = Distillation(*pair, [TaskLoss(weight=2.0), KD(weight=WarmUp(4.0, until=0.5))]).bind(BATCH)
    d.progress = 0.25
    losses = d(BATCH)
    assert isinstance(losses, Losses)
    assert losses.weights == {"TaskLoss": 2.0, "KD": 2.0}
    assert list(losses.values) == ["TaskLoss", "KD"]
    assert not any(v.requires_grad for v in losses.values.values())
    assert all(v.ndim == 0 for v in (losses.total, *losses.values.values()))
    torch.testing.assert_close(losses.total.detach(), 2.0 * losses["TaskLoss"] + 2.0 * losses["KD"])
    with pytest.raises(KeyError):
        losses["RKD"]


def test_weights_follow_progress_and_a_term_of_weight_zero_is_not_computed(pair):
    class Counted(KD):
        calls = 0

        def forward(self, *args):
            Counted.calls += 1
            return super().forward(*args)

    d = Distillation(*pair, [TaskLoss(weight=Ramp(0.0, 1.0)), Counted(weight=StopAt(1.0, at=0.5))]).bind(BATCH)
    Counted.calls = 0
    seen = []
    for d.progress in (0.0, 0.25, 0.5, 1.0):
        losses = d(BATCH)
        seen.append((losses.weights["TaskLoss"], losses.weights["Counted"], sorted(losses.values)))
    assert seen == [
        (0.0, 1.0, ["Counted"]),
        (0.25, 1.0, ["Counted", "TaskLoss"]),
        (0.5, 0.0, ["TaskLoss"]),
        (1.0, 0.0, ["TaskLoss"]),
    ]
    assert Counted.calls == 2
    assert d.skips_parameters
    assert not Distillation(*pair, [KD()]).bind(BATCH).skips_parameters


def test_when_every_weight_is_zero_there_is_a_zero_to_go_backward_from(pair):
    d = Distillation(*pair, [KD(weight=0.0)]).bind(BATCH)
    losses = d(BATCH)
    assert losses.total == 0.0
    assert losses.values == {}
    losses.total.backward()


def test_both_models_run_once_however_many_losses(pair):
    d = Distillation(*pair, [TaskLoss(), KD(), KD(temperature=2.0, name="warm"), Hint("0"), Hint("4")]).bind(BATCH)
    calls = []
    for model in pair:
        model.register_forward_pre_hook(lambda m, _: calls.append(m))
    d(BATCH)
    assert calls == [pair[1], pair[0]] or calls == [pair[0], pair[1]]


def test_a_hint_stage_runs_neither_model_past_its_tap(pair):
    d = Distillation(*pair, [Hint("0")]).bind(BATCH)
    assert d.skips_parameters
    called = []
    for model in pair:
        for i in (0, 1, 4):
            model[i].register_forward_hook(lambda *_, i=i: called.append(i))
    d(BATCH).total.backward()
    assert called == [0, 0]
    assert pair[0][4].weight.grad is None
    assert pair[0][0].weight.grad is not None


def test_a_model_read_at_its_input_alone_does_not_run(pair):
    d = Distillation(*pair, [Hint((":input", "0"))]).bind(BATCH)
    called = []
    for i in (0, 1, 4):
        pair[0][i].register_forward_hook(lambda *_, i=i: called.append(i))
    d(BATCH).total.backward()
    assert called == []
    assert all(p.grad is not None for p in d.losses.parameters())


class Slopes(Loss):
    """Squared difference of the gradients of the logits' sums with respect to the inputs."""

    needs_input_gradients = True

    def forward(self, student, teacher, batch):
        (mine,) = torch.autograd.grad(student.logits.sum(), batch.student.tensors(), create_graph=True)
        (theirs,) = torch.autograd.grad(teacher.logits.sum(), batch.teacher.tensors())
        return (mine - theirs).square().sum(1).mean()


def test_a_loss_may_derive_both_models_with_respect_to_their_inputs():
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 3), nn.Linear(6, 3)
    d = Distillation(student, teacher, [Slopes(), KD()]).bind(BATCH)
    losses = d(BATCH)
    losses.total.backward()
    # a linear model's gradient is the sum of its weights' rows, whatever the input
    slopes = [model.weight.detach().sum(0) for model in (student, teacher)]
    torch.testing.assert_close(losses["Slopes"], (slopes[0] - slopes[1]).square().sum())
    assert student.weight.grad is not None
    assert teacher.weight.grad is None
    assert not X.requires_grad
    student.zero_grad()
    Distillation(student, teacher, [Slopes()])(BATCH).total.backward()
    torch.testing.assert_close(student.weight.grad, (2 * (slopes[0] - slopes[1])).expand(3, 6))


def test_the_teacher_keeps_no_graph_unless_a_loss_asks_for_it(pair):
    kept = []
    pair[1].register_forward_hook(lambda m, x, y: kept.append(y.requires_grad))
    Distillation(*pair, [KD()])(BATCH)
    assert not any(kept)


# stages


class Prepared(Loss):
    """Has a buffer before it is bound, and writes into it when it is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.zeros(()))

    def build(self, student, teacher, batch):
        self.scale.fill_(2)

    def forward(self, student, teacher, batch):
        if self.training:
            self.scale += 1
        return self.scale * student.logits.square().mean()


def test_what_a_loss_prepares_and_goes_on_with_outlasts_binding(pair):
    before = Distillation(*pair, [Prepared()]).bind(BATCH)
    assert before.terms["Prepared"].scale == 2
    before(BATCH)
    after = Distillation(*pair, [Prepared()]).continue_from(before).bind(BATCH)
    assert after.terms["Prepared"].scale == 3


class Counts(Loss):
    """Owns a map that learns, a number that it remembers and a network with an optimiser of its own."""

    def build(self, student, teacher, batch):
        self.map = nn.Linear(3, self.size)
        self.beside = SideLearner(nn.Linear(3, 1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
        self.register_buffer("calls", torch.zeros(()))

    def __init__(self, size=2, **options):
        super().__init__(**options)
        self.size = size

    def forward(self, student, teacher, batch):
        if self.training:
            self.calls += 1
            self.beside.update(self.beside(student.logits.detach()).mean())
        return self.map(student.logits).square().mean()


def learned(loss):
    return [*loss.map.parameters(), loss.calls, *loss.beside.module.parameters()]


@pytest.mark.parametrize("same_object", [False, True])
def test_a_term_goes_on_in_the_next_stage_with_what_it_learned(pair, same_object):
    first = Counts()
    before = Distillation(*pair, [first]).bind(BATCH)
    optimizer = torch.optim.SGD(before.parameters(), lr=0.1)
    for _ in range(3):
        before(BATCH).total.backward()
        optimizer.step()
    left = copy.deepcopy(learned(first))
    second = first if same_object else Counts()
    after = Distillation(*pair, [second, TaskLoss()]).continue_from(before).bind(BATCH)
    assert second.calls == 3
    for was, now in zip(left, learned(second), strict=True):
        assert torch.equal(was, now)
    after(BATCH)
    assert second.calls == 4


def test_a_term_of_another_name_class_or_size_does_not_go_on(pair):
    before = Distillation(*pair, [Counts()]).bind(BATCH)
    before(BATCH)
    for other in (Counts(name="other"), Hint("0", name="Counts")):
        bound = Distillation(*pair, [other]).continue_from(before).bind(BATCH)
        assert getattr(bound.terms[other.name], "calls", 0) == 0
    with pytest.raises(ValueError, match=r"Counts cannot go on with what it learned in an earlier .*map\.weight"):
        Distillation(*pair, [Counts(size=5)]).continue_from(before).bind(BATCH)


def test_projectors_are_learned_with_the_student(pair):
    d = Distillation(*pair, [Hint(("4:input", "4:input"), weight=5.0)]).bind(BATCH)
    ours = {id(p) for p in d.parameters()}
    assert ours == {id(p) for p in (*pair[0].parameters(), *d.losses.parameters())}
    assert d.losses["Hint"].maps[0].weight.shape == (7, 5)
    assert {k.split(".")[0] for k in d.state_dict()} == {"student", "losses"}
    d(BATCH).total.backward()
    assert all(p.grad is not None for p in d.losses.parameters())
    optimizer = torch.optim.Adam(d.parameters(), lr=0.02)
    first = d(BATCH).total.item()
    for _ in range(40):
        optimizer.zero_grad()
        d(BATCH).total.backward()
        optimizer.step()
    assert d(BATCH).total.item() < 0.5 * first


def test_autocast_lets_the_models_run_in_bfloat16_and_the_losses_in_float32(pair):
    d = Distillation(*pair).bind(BATCH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = d(BATCH)
    assert losses.total.dtype == torch.float32
    exact = d(BATCH).total
    assert losses.total != exact
    torch.testing.assert_close(losses.total, exact, rtol=0.05, atol=0.05)


# batches of every kind


@dataclass
class Sample:
    x: Tensor
    label: Tensor


Named = namedtuple("Named", "x y")


@pytest.mark.parametrize(
    "raw",
    [
        BATCH,
        list(BATCH),
        (X, Y, torch.arange(8)),
        ({"x": X}, Y),
        {"x": X, "labels": Y},
        {"pixel_values": X, "label": Y},
        UserDict(x=X, target=Y),
        Sample(X, Y),
        Named(X, Y),
    ],
    ids=lambda raw: type(raw).__name__,
)
def test_every_kind_of_batch_costs_the_same(pair, raw):
    expected = Distillation(*pair).bind(BATCH)(BATCH).total
    torch.testing.assert_close(Distillation(*pair).bind(raw)(raw).total, expected)


def test_a_bare_tensor_is_enough_without_labels(pair):
    total = Distillation(*pair, [KD(weight=1.0)]).bind(X)(X).total
    torch.testing.assert_close(total, kd_divergence(pair[0](X), pair[1](X)))


# bad input


def refused(error: type[Exception], match: str, pair, losses, batch=BATCH, **kwargs) -> None:
    with pytest.raises(error, match=match):
        Distillation(*pair, losses, **kwargs).bind(batch)


def test_an_unknown_tap_names_loss_side_and_nearest(pair):
    refused(UnknownTap, r"Hint: student tap '9': no module '9' in Sequential; nearest", pair, [Hint("9")])
    refused(UnknownTap, r"Hint: teacher tap '40'.*nearest: '4'", pair, [Hint(("4", "40"))])
    refused(UnknownTap, r"names 5 modules.*name the pairs one by one", pair, [Hint(("*", "4"))])
    refused(UnknownTap, "no 'hidden_states' in the model's output", pair, [Hint("@hidden_states[0]")])


def test_different_class_counts_are_refused_by_response_losses(pair):
    refused(ValueError, "student has 3 classes and the teacher 4", (pair[0], mlp(7, classes=4)), [KD()])
    Distillation(pair[0], mlp(7, classes=4), [TaskLoss(), Hint("0")]).bind(BATCH)


def test_missing_labels_and_ids_are_named(pair):
    refused(ValueError, "TaskLoss needs labels", pair, [TaskLoss(), KD()], X)
    refused(ValueError, "Remembers needs sample ids.*Indexed", pair, [Remembers()], BATCH)


def test_a_batch_too_small_to_compare_is_refused(pair):
    refused(ValueError, "needs at least 2 in a batch; the first batch has 1", pair, [Compares()], (X[:1], Y[:1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(pair, bad):
    x = X.clone()
    x[3, 2] = bad
    refused(ValueError, "inputs of the student: NaN or infinite", pair, None, (x, Y))
    refused(
        ValueError,
        "inputs of the teacher: NaN or infinite",
        pair,
        None,
        {"clean": x, "noisy": X, "label": Y},
        views=Paired(student="noisy", teacher="clean"),
    )


def test_labels_outside_the_classes_are_refused(pair):
    refused(ValueError, "class 3 appears, and the student has 3 classes", pair, [TaskLoss()], (X, Y + 1))


def test_losses_that_need_a_teacher_are_refused_without_one(pair):
    for teacher in (None, NoTeacher()):
        refused(ValueError, "KD needs a teacher", (pair[0], teacher), [TaskLoss(), KD()])


def test_wrong_arguments_are_named(pair):
    with pytest.raises(TypeError, match=r"student: expected an nn.Module, got str"):
        Distillation("resnet18", pair[1])
    with pytest.raises(TypeError, match="losses: expected tutelage losses, got CrossEntropyLoss"):
        Distillation(*pair, [nn.CrossEntropyLoss()])
    with pytest.raises(ValueError, match="losses: at least one"):
        Distillation(*pair, [])
    with pytest.raises(TypeError, match="a tap is an address or"):
        Hint(("a", "b", "c"))
    with pytest.raises(ValueError, match="temperature=0"):
        KD(temperature=0)


# names


def test_default_losses():
    with_teacher = Distillation(mlp(5), mlp(7))
    assert {n: loss.weight for n, loss in with_teacher.losses.items()} == {"TaskLoss": 0.1, "KD": 0.9}
    assert list(Distillation(mlp(5)).losses) == ["TaskLoss"]


def test_losses_of_one_name_are_numbered(pair):
    d = Distillation(*pair, [KD(), KD(temperature=2.0), KD(temperature=8.0), TaskLoss(name="ce")]).bind(BATCH)
    assert list(d.losses) == ["KD", "KD_2", "KD_3", "ce"]
    assert [d.losses[n].temperature for n in ("KD", "KD_2", "KD_3")] == [4.0, 2.0, 8.0]
    assert list(d(BATCH).values) == ["KD", "KD_2", "KD_3", "ce"]


def test_no_loss_gets_lost_behind_a_chosen_name(pair):
    d = Distillation(*pair, [KD(name="KD_2"), KD(temperature=1.0), KD(temperature=2.0)])
    assert len(d.losses) == 3


# several batches in one step


@pytest.mark.parametrize("cut", [1, 3, 4, 7])
def test_parts_with_their_shares_give_the_gradient_of_the_whole(cut):
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 3), nn.Linear(6, 3)  # no batch norm, so that the parts do not see each other
    y = Y.clone()
    y[[0, 2, 3]] = UNLABELLED
    d = Distillation(student, teacher, [TaskLoss(weight=0.4), KD(weight=0.6)]).bind((X, y))
    d((X, y)).total.backward()
    whole = student.weight.grad.clone()
    student.zero_grad()

    parts = [(X[:cut], y[:cut]), (X[cut:], y[cut:])]
    units = [d.units(part) for part in parts]
    assert int(sum(u["KD"] for u in units)) == 8
    assert int(sum(u["TaskLoss"] for u in units)) == 5
    for part, unit in zip(parts, units, strict=True):
        shares = {n: unit[n] / sum(u[n] for u in units) for n in unit}
        d(part, shares=shares).total.backward()
    torch.testing.assert_close(student.weight.grad, whole)


def test_a_batch_without_a_single_label_costs_nothing_and_has_a_gradient():
    d = Distillation(nn.Linear(6, 3), None).bind(BATCH)
    losses = d((X, torch.full_like(Y, UNLABELLED)))
    assert losses.total == 0.0
    losses.total.backward()
    assert torch.equal(d.student.weight.grad, torch.zeros(3, 6))


# copies


def test_a_deep_copy_learns_alone(pair):
    d = Distillation(*pair, [TaskLoss(), KD(), Hint("0")]).bind(BATCH)
    other = copy.deepcopy(d)
    assert other.student is not d.student
    assert other.teacher.module is not d.teacher.module
    torch.testing.assert_close(other(BATCH).total, d(BATCH).total)
    other(BATCH).total.backward()
    assert all(p.grad is None for p in d.parameters())
    assert all(p.grad is not None for p in other.parameters())


def test_pickling_keeps_everything(pair):
    d = Distillation(*pair, [TaskLoss(), KD(), Hint("0", name="hint")]).bind(BATCH)
    d.eval()
    other = pickle.loads(pickle.dumps(d))
    assert torch.equal(other(BATCH).total, d(BATCH).total)
    stream = io.BytesIO()
    torch.save(d, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(BATCH).total, d(BATCH).total)


def test_the_state_loads_into_a_distillation_bound_alike_and_the_student_into_the_plain_model(pair):
    d = Distillation(*pair, [TaskLoss(), Hint("0")]).bind(BATCH)
    other = Distillation(mlp(5), pair[1], [TaskLoss(), Hint("0")]).bind(BATCH)
    other.load_state_dict(d.state_dict())
    d.eval()
    other.eval()
    assert torch.equal(other(BATCH).total, d(BATCH).total)
    mlp(5).load_state_dict(d.student.state_dict(), strict=True)


class Three(nn.Module):
    """Three layers of any width."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden, self.head = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.hidden(x).relu())


def mixed_cohort():
    torch.manual_seed(0)
    return Cohort([Three(4), Three(5), Three(7)])


def test_what_a_loss_owns_it_owns_for_each_pair_of_networks():
    batch = torch.randn(8, 6), torch.arange(8) % 3
    cohort = mixed_cohort()
    d = Distillation(cohort, DeepMutualLearning(), losses=[TaskLoss(), KD(), FitNets("hidden")]).bind(batch)
    pairs = {name.partition("@")[2]: loss.regressors[0] for name, loss in d.apart.items()}
    first = d.losses["FitNets"].regressors[0]
    assert list(pairs) == ["0_from_2", "1_from_0", "1_from_2", "2_from_0", "2_from_1"]
    assert (first.in_features, first.out_features) == (4, 5)
    assert [(r.in_features, r.out_features) for r in pairs.values()] == [(4, 7), (5, 4), (5, 7), (7, 4), (7, 5)]
    hidden = [peer.hidden(batch[0]) for peer in cohort.peers]
    regressors = {"0_from_1": first, **pairs}
    total = sum((r(hidden[int(k[0])]) - hidden[int(k[-1])]).square().mean() for k, r in regressors.items()) / 2
    torch.testing.assert_close(d(batch)["FitNets"], total.detach())
    assert {id(p) for r in regressors.values() for p in r.parameters()} <= {id(p) for p in d.parameters()}


def test_pairs_go_on_with_what_they_learned_in_an_earlier_stage():
    batch = torch.randn(8, 6), torch.arange(8) % 3
    cohort = mixed_cohort()
    first = Distillation(cohort, DeepMutualLearning(), losses=[FitNets("hidden")]).bind(batch)
    second = Distillation(cohort, DeepMutualLearning(), losses=[TaskLoss(), FitNets("hidden")])
    second.continue_from(first).bind(batch)
    for name, value in first.owned.state_dict().items():
        assert torch.equal(second.owned.state_dict()[name], value)
    torch.manual_seed(1)
    third = Distillation(cohort, DeepMutualLearning(), losses=[FitNets("hidden")]).bind(batch)
    mine, theirs = (d.apart["FitNets@1_from_0"].regressors[0].weight for d in (third, first))
    assert not torch.equal(mine, theirs)


def test_a_resumed_run_has_every_pairs_own(tmp_path):
    data = [(torch.randn(8, 6), torch.arange(8) % 3) for _ in range(4)]

    class Stop(Exception):
        pass

    def stop(line):
        raise Stop

    def run(out, **more):
        torch.manual_seed(0)
        d = Distillation(
            mixed_cohort(), DeepMutualLearning(), losses=[TaskLoss(), FitNets("hidden"), LogitCritic(hidden=4)]
        )
        fit(d, data, training=Training(epochs=2, lr=1e-3, progress=False), out=tmp_path / out, **more)
        beside = [v for side in d.side_learners().values() for v in side.module.state_dict().values()]
        return [*d.state_dict().values(), *beside]

    straight = run("straight")
    with pytest.raises(Stop):
        run("broken", after_epoch=stop)
    resumed = run("broken", resume=True)
    assert len(straight) > 40
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed, straight, strict=True))
