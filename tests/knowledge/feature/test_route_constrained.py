from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tutelage import KD, Distillation, FitNets, RouteConstrained, TaskLoss, Training, distill
from tutelage.building import RecipeError
from tutelage.checkpoint import write_weights
from tutelage.comparison import read_comparison
from tutelage.engine import fit
from tutelage.knowledge.feature.route_constrained import equal_parts
from tutelage.recipe import load, read
from tutelage.run import Run
from tutelage.tuning import tune

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)
DATA = [(x, y) for x, y in zip(X.split(16), Y.split(16), strict=True)]


def network(width: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def states(count: int, width: int = 8) -> list[dict[str, torch.Tensor]]:
    return [network(width, seed).state_dict() for seed in range(1, count + 1)]


def said(width: int, state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    model = network(width)
    model.load_state_dict(state)
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("at", [None, [0.1, 0.2, 0.9]])
def test_each_anchor_teaches_from_its_boundary_to_the_next_and_the_final_network_last(at):
    teacher, anchors = network(8), states(3)
    role = RouteConstrained(teacher, anchors, at)
    d = Distillation(network(4), role, losses=[KD()]).bind(DATA[0])
    boundaries = at or [0.25, 0.5, 0.75]
    assert equal_parts(3) == [0.25, 0.5, 0.75]
    route = [*anchors, teacher.state_dict()]
    for i in (*range(20), 3, 18, 0):  # also backwards: only the progress counts
        expected = said(8, route[sum(i / 20 >= b for b in boundaries)], X[:16])
        batch = replace(d.views(DATA[0]), progress=i / 20)
        (lesson,) = role.lessons(batch, d.observer(batch.student))
        assert torch.equal(lesson.teacher.logits, expected)


def test_the_term_is_the_naive_one_against_the_anchor_of_the_moment():
    teacher, anchors, student = network(8), states(1), network(4)
    d = Distillation(student, RouteConstrained(teacher, anchors), losses=[KD(temperature=2.0, weight=1.0)])
    for progress, state in ((0.0, anchors[0]), (0.7, teacher.state_dict())):
        d.progress = progress
        value = d(DATA[0])["KD"]
        soft = (said(8, state, X[:16]) / 2).softmax(1)
        naive = 4 * (soft * (soft.log() - (student(X[:16]) / 2).log_softmax(1))).sum(1).mean()
        torch.testing.assert_close(value, naive.detach())


def test_the_final_network_is_untouched_and_in_no_parameter():
    teacher, anchors, student = network(8).train(), states(2), network(4)
    before = copy.deepcopy(teacher.state_dict())
    kept = copy.deepcopy(anchors)
    d = Distillation(student, RouteConstrained(teacher, anchors), losses=[TaskLoss(), FitNets("1", weight=0.1), KD()])
    fit(d, DATA, None, training=Training(epochs=2, progress=False, cpu=True))
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    for mine, given in zip(anchors, kept, strict=True):
        assert all(torch.equal(mine[k], v) for k, v in given.items())
    assert not any(p.requires_grad for p in teacher.parameters())
    ours = {id(p) for p in d.parameters()}
    assert not ours & {id(p) for p in teacher.parameters()}
    assert not ours & {id(p) for p in d.teacher._on_the_way.parameters()}
    assert sum(p.numel() for p in d.parameters()) == sum(
        p.numel() for m in (student, d.losses["FitNets"]) for p in m.parameters()
    )


def test_files_are_read_and_move_with_the_distillation(tmp_path):
    anchors = states(2)
    write_weights(tmp_path / "a.safetensors", anchors[0])
    torch.save(anchors[1], tmp_path / "b.pt")
    role = RouteConstrained(network(8), [str(tmp_path / "a.safetensors"), tmp_path / "b.pt"])
    d = Distillation(network(4).double(), role, losses=[KD()])
    d.double()
    batch = (X[:16].double(), Y[:16])
    values = []
    for d.progress in (0.0, 0.4, 0.9):
        values.append(d(batch)["KD"].item())
    assert len(set(values)) == 3
    assert role._on_the_way[0].weight.dtype == torch.float64


def test_refusals(tmp_path):
    def bound(role):
        Distillation(network(4), role, losses=[KD()]).bind(DATA[0])

    with pytest.raises(ValueError, match="no anchors: give anchors="):
        bound(RouteConstrained(network(8)))
    for at in ([0.5], [0.5, 0.5], [0.6, 0.4], [0.0, 0.5], [0.5, 1.0]):
        with pytest.raises(ValueError, match="expected 2 rising parts"):
            RouteConstrained(network(8), states(2), at)
    with pytest.raises(ValueError, match=r"anchors\[1\]: not the weights"):
        bound(RouteConstrained(network(8), [*states(1), *states(1, width=9)]))
    write_weights(tmp_path / "other.safetensors", states(1, width=9)[0])
    with pytest.raises(ValueError, match=r"other.safetensors is not a checkpoint"):
        bound(RouteConstrained(network(8), [tmp_path / "other.safetensors"]))
    with pytest.raises(FileNotFoundError):
        bound(RouteConstrained(network(8), [tmp_path / "none.safetensors"]))
    with pytest.raises(TypeError, match="expected a list"):
        RouteConstrained(network(8), "a.safetensors")
    with pytest.raises(ValueError, match="kept no weights"):
        RouteConstrained(network(8)).follow(Run(epoch=4))


# where anchors come from


def trained(out=None, **settings):
    teacher = network(8)
    settings = {"epochs": 6, "lr": 0.2, "progress": False, "cpu": True, **settings}
    return teacher, distill(teacher, None, DATA, DATA, out=out, **settings)


def test_a_training_keeps_the_weights_of_every_so_many_epochs(tmp_path):
    stopped = []
    for epochs in (2, 4):  # with a constant rate a shorter training is the beginning of a longer one
        stopped.append(trained(epochs=epochs, scheduler="constant")[1].runs[-1].last)
    _, result = trained(scheduler="constant", keep_every=2)
    _, written = trained(tmp_path / "run", scheduler="constant", keep_every=2)
    kept = result.runs[-1].kept
    assert list(kept) == [2, 4, 6]
    for epoch, state in zip((2, 4), stopped, strict=True):
        assert all(torch.equal(state[k], v) for k, v in kept[epoch].items())
    files = written.runs[-1].kept
    assert [f.name for f in files.values()] == [f"student-epoch-000{n}.safetensors" for n in (2, 4, 6)]
    assert sorted((tmp_path / "run").glob("student-epoch-*")) == list(files.values())
    role = RouteConstrained(network(8), list(files.values()))
    Distillation(network(4), role, losses=[KD()]).bind(DATA[0])
    assert all(torch.equal(kept[2][k], v) for k, v in role._on_the_way.state_dict().items())
    assert not trained(epochs=3)[1].runs[-1].kept
    _, again = trained(tmp_path / "run", scheduler="constant", keep_every=2, resume=True)
    assert again.runs[-1].kept == files
    trained(tmp_path / "run", scheduler="constant", epochs=1, overwrite=True)
    assert not list((tmp_path / "run").glob("student-epoch-*"))


@pytest.mark.parametrize("wrong", [0, 1.5])
def test_keep_every_is_a_whole_number(wrong):
    with pytest.raises(ValueError, match=f"keep_every={wrong}"):
        Training(epochs=1, keep_every=wrong)


def test_the_route_ends_where_the_teacher_was_best():
    run = Run(epoch=6, best_epoch=3, kept=dict(enumerate(states(6), start=1)))
    role = RouteConstrained(network(8))
    role.follow(run)
    assert role.anchors == [run.kept[n] for n in (1, 2, 3)]  # epoch 4 is the best: those are the network's own
    run.best_epoch = None
    role.follow(run)
    assert role.anchors == [run.kept[n] for n in range(1, 6)]


def test_a_resumed_run_goes_on_with_the_right_anchor_bit_for_bit(tmp_path):
    teacher, anchors = network(8), states(2)

    def train(out, cut=None, resume=False):
        class Cut(torch.optim.SGD):
            count = 0

            def step(self, closure=None):
                if self.count == cut:
                    raise OSError("power cut")
                self.count += 1
                return super().step(closure)

        student = network(4, seed=9)
        role = RouteConstrained(teacher, anchors)
        how = Training(epochs=3, checkpoint_every=3, optimizer=lambda p: Cut(p, lr=0.1), progress=False, cpu=True)
        fit(Distillation(student, role, [KD()]), DATA, None, training=how, out=out, resume=resume)
        return student.state_dict()

    expected = train(tmp_path / "whole")
    with pytest.raises(OSError, match="power cut"):
        train(tmp_path / "cut", cut=7)  # after the first boundary, at step 4 of 12
    got = train(tmp_path / "cut", resume=True)
    assert all(torch.equal(expected[k], v) for k, v in got.items())


# recipes


def recipe(tmp_path, **changes):
    fields = {
        "student": {"class_path": "SmallCNN", "init_args": {"width": 2}},
        "teacher": {
            "class_path": "RouteConstrained",
            "init_args": {"module": {"class_path": "SmallCNN", "init_args": {"width": 4}}},
        },
        "data": {"class_path": "fashion_loaders", "init_args": {"batch_size": 50, "limit": 100, "validation": 50}},
        "teacher_training": {"epochs": 4, "lr": 0.2, "progress": False},
        "training": {"epochs": 2, "progress": False},
        "out": str(tmp_path / "run"),
        **changes,
    }
    return load({k: v for k, v in fields.items() if v is not None})


def test_a_recipe_records_the_route_of_the_teacher_that_it_trains_and_resumes(tmp_path):
    run = recipe(tmp_path, control=True)
    role = run.keywords["teacher"]
    result = run()
    best = result.teacher_metrics
    assert result.teacher is role.module
    assert best is not None
    assert result.control is not None
    folder = tmp_path / "run" / "teacher"
    files = sorted(folder.glob("student-epoch-*.safetensors"))
    assert [f.name[14:18] for f in files] == ["0001", "0002", "0003", "0004"]
    assert role.anchors == files[: len(role.anchors)]
    again = recipe(tmp_path, control=True, resume=True)
    second = again()
    assert again.keywords["teacher"].anchors == role.anchors
    for name, value in result.student.state_dict().items():
        assert torch.equal(value, second.student.state_dict()[name])
    alone = recipe(tmp_path, out=None, teacher_training={"epochs": 4, "lr": 0.2, "progress": False, "keep_every": 1})
    third = alone()
    for name, value in result.student.state_dict().items():
        assert torch.equal(value, third.student.state_dict()[name])


def through(assistant):
    return {"class_path": "teacher_assistant", "init_args": {"assistants": [assistant]}}


def test_a_recipe_may_name_files_and_weights_and_assistants(tmp_path):
    recipe(tmp_path)()
    files = sorted(str(f) for f in (tmp_path / "run" / "teacher").glob("student-epoch-*"))[:2]
    module = {"class_path": "SmallCNN", "init_args": {"width": 4}}
    named = {"class_path": "RouteConstrained", "init_args": {"module": module, "anchors": files, "at": [0.2, 0.6]}}
    weights = str(tmp_path / "run" / "teacher" / "student.safetensors")
    run = recipe(tmp_path, teacher=named, teacher_training=None, teacher_weights=weights, out=None)
    result = run()
    assert run.keywords["teacher"].anchors == files
    assert result.teacher_metrics.samples == result.metrics.samples
    chain = recipe(tmp_path, teacher=named, teacher_training=None, teacher_weights=weights, out=None,
                   procedure=through({"class_path": "SmallCNN", "init_args": {"width": 3}}))  # fmt: skip
    assert chain().teacher is not chain.keywords["teacher"].module
    assert chain.keywords["teacher"]._leg == 2  # the first leg went the whole way
    with pytest.raises(RecipeError, match="procedure: teacher: assistants need a network"):
        recipe(tmp_path, teacher="DeepMutualLearning", teacher_training=None, out=None, procedure=through("SmallCNN"))
    with pytest.raises(RecipeError, match="rising"):
        recipe(tmp_path, teacher={**named, "init_args": {**named["init_args"], "at": [0.6]}})


def test_in_a_comparison_it_trains_a_teacher_with_its_own_route():
    fields = {
        "recipe": "kd",
        "methods": {"RouteConstrained": {}},
        "seeds": [0],
    }
    cells, skipped = read_comparison(fields).plan()
    (cell,) = (c for c in cells if c.method == "RouteConstrained")
    assert not skipped
    assert cell.fields["teacher"]["init_args"]["module"] == {"class_path": "SmallCNN", "init_args": {"width": 32}}
    assert cell.fields["teacher_training"]["epochs"] == 6
    assert "teacher_weights" not in cell.fields
    known = {**fields, "teachers": {"known": {"teacher_training": None, "teacher_weights": "a.safetensors"}}}
    known["recipe"] = {**read("kd"), "teacher_training": None}
    cells, skipped = read_comparison(known).plan()
    assert ["it needs $teacher_training" in s.reason for s in skipped] == [True]


def test_tune_refuses_a_teacher_with_a_route_of_its_own(tmp_path):
    pytest.importorskip("optuna")
    with pytest.raises(ValueError, match="train this one before"):
        tune("route_constrained", ["temperature"], trials=1, out=tmp_path / "study")


def test_a_student_goes_further_with_its_teacher_when_it_is_led_there():
    """Held-out divergence from the final teacher is smaller than that of the student trained alone."""
    torch.manual_seed(0)
    x = torch.randn(512, 6)
    y = (x[:, :3] + 0.3 * torch.randn(512, 3)).argmax(1)
    train = list(zip(x[:256].split(32), y[:256].split(32), strict=True))
    fresh = x[256:]
    teacher = network(32)
    result = distill(teacher, None, train, epochs=8, lr=0.1, keep_every=2, progress=False, cpu=True)
    led, alone = network(4, seed=3), network(4, seed=3)
    role = RouteConstrained(teacher)
    role.follow(result.runs[-1])
    settings = {"epochs": 8, "lr": 0.1, "progress": False, "cpu": True}
    distill(led, role, train, losses=[KD(temperature=2.0, weight=1.0)], **settings)
    distill(alone, None, train, **settings)

    def away(student):
        with torch.no_grad():
            target = teacher.eval()(fresh).softmax(1)
            return F.kl_div(student.eval()(fresh).log_softmax(1), target, reduction="batchmean")

    assert away(led) < 0.8 * away(alone)
