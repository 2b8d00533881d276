"""Every scheme's teacher with losses that its paper does not have: any loss can stand beside any of them.

The methods are found in the catalogue and built by their packaged recipes, so a new one is tested without a line here.
"""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch import nn

from tutelage import (
    KD,
    RKD,
    AttentionTransfer,
    AveragedEnsemble,
    Codistillation,
    DeepMutualLearning,
    Distillation,
    FitNets,
    RouteConstrained,
    SimilarityPreserving,
    TaskLoss,
    born_again,
    methods,
)
from tutelage.data import Images, ImageSet, fashion_subset, loaders
from tutelage.models import SmallCNN
from tutelage.recipe import load
from tutelage.schemes.online.exchange import Exchange

FOUND = [m.name for m in methods() if m.role == "teacher" and not m.section.startswith("5")]
ADDRESSES = ("stage2", "linear:input")  # of a feature map and of a vector, in the recipes' networks
OTHER_ADDRESSES = {
    "BeYourOwnTeacher": ("@feature", "@feature"),  # an exit has its logits and one feature
    "DenseMutual": ("@feature", "@feature"),  # the same
}
CHANGES = {
    # of features of unlike sizes there is no mean that a group could teach
    "KDCL": ("student.init_args.peers.0.init_args.width=16",),
    "FeatureFusion": ("student.init_args.cohort.init_args.peers.0.init_args.width=16",),
}
UNTAUGHT = {
    "OKDDip": ("student.query.", "student.key."),  # its attention learns by its own AttendedKD alone, and says so
}


@functools.cache
def few_images() -> ImageSet:
    whole = fashion_subset()
    parts = (Images(part.images[:n], part.labels[:n]) for part, n in ((whole.train, 1300), (whole.test, 20)))
    return ImageSet(*parts, whole.classes)


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr(loaders, "fashion_subset", few_images)


def terms(kind, addresses):
    feature, vector = addresses
    if kind == "hint":
        return [TaskLoss(), KD(temperature=2.0), FitNets(feature), RKD(vector)]
    return [TaskLoss(), KD(temperature=2.0), AttentionTransfer(feature), SimilarityPreserving(vector)]


class Case:
    """A method's own recipe with other losses, its batches, and one step after another."""

    def __init__(self, name, kind, folder, **options):
        recipe = next(m.recipe for m in methods() if m.name == name).removesuffix(".yaml")
        self.built = load(recipe, CHANGES.get(name, ())).keywords
        role = self.built["teacher"]
        if name == "Codistillation":  # the other peer's weights lie there
            if not Exchange(folder).found(1):
                Exchange(folder).publish(1, 1, SmallCNN(width=16).state_dict())
            role = Codistillation(folder, 0, 2, every=1)
        if name == "RouteConstrained":
            role.anchors = [{k: v * 0.9 for k, v in role.module.state_dict().items() if v.is_floating_point()}]
            role.anchors[0] = {**role.module.state_dict(), **role.anchors[0]}
        if name == "DeepMutualLearning":
            role = DeepMutualLearning(**options)
        torch.manual_seed(0)
        self.batches = []
        for raw, _ in zip(self.built["data"].train, range(4), strict=False):
            self.batches.append(tuple(part[:12] for part in raw) if isinstance(raw, tuple) else raw)
        losses = terms(kind, OTHER_ADDRESSES.get(name, ADDRESSES))
        self.lessons, taught = [], role.lessons
        self.d = Distillation(self.built["student"], role, losses=losses, views=self.built.get("views"))
        self.d.bind(self.batches[0], population=300)
        role.lessons = lambda *given: self.lessons.append(taught(*given)) or self.lessons[-1]
        self.optimizer = torch.optim.SGD([p for p in self.d.parameters() if p.requires_grad], lr=0.01)

    def losses(self, number):
        """Of one batch, with random numbers that are its own."""
        torch.manual_seed(100 + number)
        self.d.progress = number / 4
        return self.d(self.batches[number])

    def step(self, number):
        losses = self.losses(number)
        self.optimizer.zero_grad()
        losses.total.backward()
        self.optimizer.step()
        return losses

    def state(self):
        """As it comes back from a file of a checkpoint."""
        state = {
            "weights": self.d.state_dict(),
            "teacher": self.d.teacher.own_state(),
            "beside": {name: learner.own_state() for name, learner in self.d.side_learners().items()},
        }
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, state):
        self.d.load_state_dict(state["weights"])
        for name, learner in self.d.side_learners().items():
            learner.load_own_state(state["beside"][name])
        self.d.teacher.load_own_state(state["teacher"])


CASES = [
    pytest.param(name, kind, options, id="-".join([name, *options.values(), kind]))
    for name in FOUND
    for options in ([{"target": "each"}, {"target": "ensemble"}] if name == "DeepMutualLearning" else [{}])
    for kind in (("hint",) if name in OTHER_ADDRESSES else ("hint", "attention"))  # a vector has no attention map
]


def tensors(record):
    return [*record.taps.values(), *([] if record.output is None else [record.logits])]


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_teaches_with_other_losses(name, kind, options, tmp_path):
    case = Case(name, kind, tmp_path / "a", **options)
    values = [case.step(number) for number in range(3)]

    # finite, and every term there
    assert {type(case.d.terms[term]) for term in values[-1].values} == {type(loss) for loss in case.d.terms.values()}
    assert all(value.isfinite() for losses in values for value in losses.values.values())

    # every learner and every projector gets a gradient, and no target does
    for term, parameter in case.d.named_parameters():
        if parameter.requires_grad and not term.startswith(UNTAUGHT.get(name, ("none",))):
            assert parameter.grad is not None, term
            assert parameter.grad.isfinite().all(), term
    for lesson in case.lessons[-1]:
        assert any(tensor.requires_grad for tensor in tensors(lesson.student))
        assert lesson.teacher is None or not any(tensor.requires_grad for tensor in tensors(lesson.teacher))
    assert any(lesson.teacher is not None for lesson in case.lessons[-1])

    # deterministic
    again = Case(name, kind, tmp_path / "b", **options)
    for number, losses in enumerate(values):
        assert again.step(number).total.item() == losses.total.item()

    # what a checkpoint holds is enough to go on with the same loss
    state = case.state()
    expected = case.losses(3)
    torch.manual_seed(7)
    resumed = Case(name, kind, tmp_path / "a", **options)
    resumed.load(state)
    found = resumed.losses(3)
    assert found.values.keys() == expected.values.keys()
    for term, value in expected.values.items():
        assert found.values[term].item() == value.item(), term


def test_the_list_is_that_of_the_catalogue():
    assert {"DeepMutualLearning", "Codistillation", "BeYourOwnTeacher", "ParameterSharing", "RouteConstrained"} <= set(
        FOUND
    )
    assert {*OTHER_ADDRESSES, *CHANGES, *UNTAUGHT} <= {m.name for m in methods()}


# an ensemble where a network teaches


def ensemble(count=2):
    torch.manual_seed(1)
    return AveragedEnsemble([SmallCNN(width=6) for _ in range(count)], average="probabilities")


def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(8, 1, 28, 28, generator=g), torch.arange(8)


def mixed():
    return [TaskLoss(), KD(), FitNets(("stage2", "members.1.stage2")), RKD(("linear:input", "members.0.linear:input"))]


@pytest.mark.parametrize("route", [False, True])
def test_an_ensemble_teaches_as_one_network(route):
    """Offline, and along its members' common route."""
    torch.manual_seed(0)
    student, teacher = SmallCNN(width=4), ensemble()
    before = copy.deepcopy(teacher.state_dict())
    early = {k: v / 2 if v.is_floating_point() else v for k, v in before.items()}
    role = RouteConstrained(teacher, [early]) if route else teacher
    d = Distillation(student, role, losses=mixed()).bind(batch())
    at_first = d(batch())
    d.progress = 0.9
    at_last = d(batch())
    assert (at_first["KD"].item() != at_last["KD"].item()) == route
    at_last.total.backward()
    assert all(p.grad is not None for p in d.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    with torch.no_grad():
        probabilities = sum(m.eval()(batch()[0]).softmax(1) for m in teacher.members) / 2
        logits = student.train()(batch()[0])
        kl = (probabilities * (probabilities.log() - logits.log_softmax(1))).sum(1).mean()
    plain = Distillation(student, teacher, losses=[KD(temperature=1.0)]).bind(batch())
    torch.testing.assert_close(plain(batch())["KD"], kl)


def test_generations_begin_with_an_ensemble_and_end_in_one():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    first = AveragedEnsemble([copy.deepcopy(student), nn.Sequential(nn.Flatten(), nn.Linear(784, 10))])
    results = born_again(
        student, first, [batch()], [batch()], generations=2, ensemble=2, epochs=1, progress=False, cpu=True
    )
    assert results[0].teacher is first
    assert isinstance(results[-1].student, AveragedEnsemble)
    assert results[-1].student.members[-1] is student


def test_an_ensemble_beside_stale_peers_is_one_more_peer(tmp_path):
    """A trained ensemble may stand in the place of a peer: it leaves its weights once."""
    other = ensemble()
    Exchange(tmp_path).publish(1, 0, other.state_dict(), last=True)
    torch.manual_seed(0)
    student = SmallCNN(width=4)
    role = Codistillation(tmp_path, 0, 2, every=1, networks=[student, ensemble(2)])
    d = Distillation(student, role, losses=[TaskLoss(), KD(temperature=1.0)]).bind(batch())
    optimizer = torch.optim.SGD(d.parameters(), lr=0.01)
    for _ in range(2):
        losses = d(batch())
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert role.seen == [None, 0]
    lesson = role.lessons(d.views(batch()), d.observer(d.views(batch()).student))[0]
    with torch.no_grad():
        torch.testing.assert_close(lesson.teacher.logits, other.eval()(batch()[0]))
