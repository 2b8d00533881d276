"""The path from teacher to student: what each search trains, and what it chooses."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tutelage import KD, TaskLoss, choose_assistants
from tutelage.architecture import assistant_path as module
from tutelage.architecture.assistant_path import trainings_needed


class Named(nn.Module):
    """A network that only has a name and the way that it was taught."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.way, self.draw = name, (), float(torch.rand(()))


@pytest.fixture
def family(monkeypatch):
    """``choose`` on made-up accuracies of ways, and every training that it does."""
    done = []

    def set_up(accuracies, teacher_accuracy=0.9):
        def stand_in(student, teacher, train, validation, **settings):
            student.way = (*teacher.way, student.name) if teacher is not None else ("labels", student.name)
            done.append((student.way, student.draw, settings["losses"]))
            return SimpleNamespace(student=student, metrics=SimpleNamespace(value=accuracies(student.way)))

        monkeypatch.setattr(module, "distill", stand_in)
        monkeypatch.setattr(module, "evaluate", lambda *_, **__: SimpleNamespace(value=teacher_accuracy))
        return done

    return set_up


def choose(names="abc", teacher=None, **how):
    candidates = {name: partial(Named, name) for name in names}
    return choose_assistants(partial(Named, "student"), candidates, teacher or Named("teacher"), [], [], **how)


def test_exhaustive_tries_every_path_and_trains_nothing_twice(family):
    done = family(lambda way: 0.5 + 0.1 * ("b" in way) - 0.01 * len(way))
    found = choose(search="exhaustive")
    assert {t.assistants for t in found.tried} == {
        (), ("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")
    }  # fmt: skip
    ways = [way for way, _, _ in done]
    assert len(ways) == len(set(ways)) == found.trainings == trainings_needed(3, "exhaustive") == 15
    assert found.best.assistants == ("b",)
    assert found.student.way == ("b", "student")
    assert [network.way for network in found.assistants] == [("b",)]
    assert [t.accuracy for t in found.tried] == sorted((t.accuracy for t in found.tried), reverse=True)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("longest", [1, 2, None])
def test_the_number_of_trainings_is_known_before(family, count, longest):
    done = family(lambda way: -len(way))
    for search in ("exhaustive", "best copies", "mean accuracy"):
        done.clear()
        found = choose("abcd"[:count], search=search, longest=longest)
        needed = trainings_needed(count, search, longest)
        assert found.trainings == len(done)
        assert len(done) <= needed
        if search != "best copies" or longest is None:
            assert len(done) == needed
        assert all(len(t.assistants) <= (longest or count) for t in found.tried)


def test_the_best_single_size_is_the_papers_first_experiment(family):
    family(lambda way: {"a": 0.6, "b": 0.65, "c": 0.7}.get(way[0], 0.5))
    found = choose(longest=1)
    assert {t.assistants for t in found.tried} == {(), ("a",), ("b",), ("c",)}
    assert found.best.assistants == ("c",)


def test_best_copies_goes_on_from_the_best_of_each(family):
    # b is better when a teaches it, c is best taught by the teacher
    table = {("b",): 0.5, ("a", "b"): 0.6, ("c",): 0.7, ("a", "c"): 0.6, ("a", "b", "c"): 0.65, ("a",): 0.5}
    done = family(lambda way: table.get(way, 0.1 * len(way)))
    found = choose(search="best copies")
    assert {t.assistants for t in found.tried} == {(), ("a",), ("a", "b"), ("c",)}
    assert ("b", "c") not in {way for way, _, _ in done}
    assert found.best.assistants == ("a", "b")
    assert found.trainings == 10


def test_best_copies_finds_the_best_path_where_better_copies_teach_better(family):
    # how well a network is taught: its size times something that rises with its teacher's figure
    gain = {"a": 0.97, "b": 0.95, "c": 0.9, "student": 0.8}

    def figure(way):
        value = 0.95
        for name in way:
            value = gain[name] * (0.6 + 0.4 * value)
        return value

    family(figure)
    assert choose(search="best copies").best.accuracy == choose(search="exhaustive").best.accuracy


def test_mean_accuracy_takes_the_one_nearest_to_the_middle(family):
    alone = {"a": 0.88, "b": 0.8, "c": 0.72, "student": 0.6}
    done = family(lambda way: alone[way[1]] if way[0] == "labels" else 0.66)
    found = choose(search="mean accuracy")  # the middle of 0.9 and 0.6 is 0.75
    assert found.best.assistants == ("c",)
    assert found.alone == alone
    assert [way for way, _, _ in done] == [("labels", n) for n in (*"abc", "student")] + [("c",), ("c", "student")]


def test_the_budget_chooses_the_search_or_refuses(family):
    family(lambda way: 0.5)
    assert [choose(budget=n).search for n in (None, 15, 14, 10, 9, 6)] == [
        "exhaustive", "exhaustive", "best copies", "best copies", "mean accuracy", "mean accuracy"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"budget=5 trainings: of 3 candidates exhaustive takes 15, best copies"):
        choose(budget=5)
    with pytest.raises(ValueError, match=r"exhaustive takes 15$"):
        choose(search="exhaustive", budget=12)
    assert choose(budget=5, search="exhaustive", longest=1, names="ab").trainings == 5


def test_what_makes_no_sense_is_refused(family):
    done = family(lambda way: 0.5)
    bound = KD()
    bound.pairs = [("@logits", "@logits")]
    for arguments, said in (
        ({"names": ""}, "candidates: expected one"),
        ({"names": ["student"]}, "the student's own name"),
        ({"longest": 0}, "longest=0"),
        ({"search": "greedy"}, "search='greedy': expected one of"),
        ({"losses": [bound]}, "KD was bound"),
    ):
        with pytest.raises(ValueError, match=said):
            choose(**arguments)
    assert not done


def test_networks_of_a_name_start_alike_and_have_losses_of_their_own(family):
    done = family(lambda way: 0.5)
    losses, teacher = [TaskLoss(), KD()], Named("teacher")
    before = torch.get_rng_state()
    choose("ab", teacher=teacher, losses=losses, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    draws = {way[-1]: {d for w, d, _ in done if w[-1] == way[-1]} for way, _, _ in done}
    assert all(len(d) == 1 for d in draws.values())
    assert len({id(given[1]) for _, _, given in done} | {id(losses[1])}) == len(done) + 1
    done.clear()
    choose("ab", search="mean accuracy", losses=losses)
    assert [given is None for _, _, given in done] == [True, True, True, False, False]


def test_a_real_search():
    def net(width):
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))

    def labelled(count, seed):
        x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
        return [(a, b) for a, b in zip(x.split(32), x[:, :3].argmax(1).split(32), strict=True)]

    torch.manual_seed(0)
    train, validation, teacher = labelled(128, 0), labelled(128, 1), net(32)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(30):
        for x, y in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(teacher(x), y).backward()
            optimizer.step()
    weights = [p.clone() for p in teacher.parameters()]
    found = choose_assistants(
        partial(net, 3), {str(w): partial(net, w) for w in (16, 8)}, teacher, train, validation, epochs=4, lr=0.1,
        cpu=True, progress=False, gradient_shares=False,
    )  # fmt: skip
    assert found.trainings == 7
    assert found.best.accuracy == max(t.accuracy for t in found.tried)
    with torch.no_grad():
        right = torch.cat([found.student(x).argmax(1) == y for x, y in validation]).float().mean()
    assert float(right) == pytest.approx(found.best.accuracy)
    assert [n[0].out_features for n in found.assistants] == [int(name) for name in found.best.assistants]
    assert all(torch.equal(a, b) for a, b in zip(weights, teacher.parameters(), strict=True))
